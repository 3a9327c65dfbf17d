import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.adapters import LoraConfig, make_adapter
from finetune.adapters.adapter import Adapter, Factors, merge, rebase, select
from finetune.adapters.peft_export import CONFIG_NAME, WEIGHTS_NAME, export_peft, fold
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, NormConfig
from models.decoder import Decoder
from models.errors import InputError
from models.weights.assemble import parameter_shapes


def drawn(shapes, seed=0):
    """{path: {name: normal numbers}} of {path: {name: shape}}."""
    rng = np.random.default_rng(seed)
    return {
        path: {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in named.items()}
        for path, named in shapes.items()
    }


def adapter_of(core=None, scale=0.5, move=0.0):
    """A method that trains all factors; its kernels start `move` times a frozen product lower."""

    def factors(frozen, trainable, shape):
        return Factors(trainable["a"], trainable.get("core"), trainable["b"], scale)

    def lower(kernel, frozen):
        return kernel - move * frozen["a"] @ frozen["b"]

    return Adapter(lambda *args: None, factors, lower) if move else Adapter(lambda *args: None, factors)


def shapes_of(params, ranks, core=None):
    kernels = select(params, tuple(ranks))
    shapes = {}
    for path, kernel in kernels.items():
        rank = ranks[path.rsplit("/", 1)[1]]
        shapes[path] = {"a": (kernel.shape[0], rank), "b": (rank, kernel.shape[1])}
        if core is not None:
            shapes[path]["core"] = (rank,) * core
    return shapes


@pytest.mark.parametrize("core", [None, 1, 2])
@pytest.mark.parametrize("move", [0.0, 1.5])
def test_a_folded_adapter_is_the_difference_from_the_model(core, move, tiny):
    params = tiny[1]
    shapes = shapes_of(params, {"q": 2, "down": 3}, core)
    frozen, trainable = drawn(shapes, 1), drawn(shapes, 2)
    adapter = adapter_of(core, move=move)
    merged = merge(adapter, rebase(adapter, params, frozen), frozen, trainable)
    own, after = select(params, ("q", "down")), select(merged, ("q", "down"))
    folded = fold(adapter, params, frozen, trainable)
    assert folded.keys() == own.keys()
    for path, lora in folded.items():
        assert lora.a.shape[0] == lora.b.shape[1] == shapes[path]["b"][0] * (2 if move else 1)
        np.testing.assert_allclose(lora.scale * (lora.b @ lora.a).T, after[path] - own[path], atol=2e-5)


def exported(folder, config, adapter, trainable, params=None):
    params = params if params is not None else Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = params.get("params", params)
    export_peft(folder, config, "hub/name", adapter, params, {path: {} for path in trainable}, trainable)
    return json.loads((folder / CONFIG_NAME).read_text()), load_file(folder / WEIGHTS_NAME)


def test_names_shapes_and_settings(tiny, tmp_path):
    model, params = tiny
    trainable = drawn(shapes_of(params, {"q": 2, "k": 2, "v": 2, "o": 2, "up": 2, "down": 3}))
    path = "layers_1/attention/v"
    trainable[path] = {"a": trainable[path]["a"][:, :0], "b": trainable[path]["b"][:0]}
    config, tensors = exported(tmp_path / "peft", model.config, adapter_of(scale=0.5), trainable, params)
    assert config["r"] == 2 and config["lora_alpha"] == 1.0 and config["base_model_name_or_path"] == "hub/name"
    downs = {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    assert config["rank_pattern"] == dict.fromkeys(downs, 3)
    assert config["alpha_pattern"] == dict.fromkeys(downs, 1.5)
    assert not config["fan_in_fan_out"] and len(config["target_modules"]) == 17
    assert "model.layers.1.self_attn.v_proj" not in config["target_modules"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], trainable["layers_0/attention/q"]["a"].T)
    assert len(tensors) == 34


def test_the_file_holds_what_was_folded(tiny, tmp_path):
    """Of a method that moves kernels too, whose factors come out of a decomposition in another order in memory."""
    model, params = tiny
    adapter, shapes = adapter_of(move=1.5), shapes_of(params, {"q": 2, "down": 3})
    frozen, trainable = drawn(shapes, 1), drawn(shapes, 2)
    export_peft(tmp_path / "peft", model.config, "hub/name", adapter, params, frozen, trainable)
    tensors = load_file(tmp_path / "peft" / WEIGHTS_NAME)
    lora = fold(adapter, params, frozen, trainable)["layers_2/mlp/down"]
    np.testing.assert_array_equal(tensors["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"], lora.a)
    np.testing.assert_array_equal(tensors["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"], lora.b)


def gpt2():
    norm = NormConfig("layer")
    block = BlockConfig(AttentionConfig(2, 2, 8, True, True, rope=None), MLPConfig(24, "gelu_tanh", False, True), norm)
    return DecoderConfig("gpt2", 61, 16, (block,), 32, norm, tied_embeddings=True, learned_positions=True)


def test_gpt2s_names_and_its_joined_projections(tmp_path):
    zeros = {"a": jnp.zeros((16, 2)), "b": jnp.zeros((2, 16))}
    config, tensors = exported(tmp_path / "peft", gpt2(), adapter_of(), {"layers_0/attention/o": zeros})
    assert config["fan_in_fan_out"] and config["target_modules"] == ["transformer.h.0.attn.c_proj"]
    assert set(parameter_shapes(Decoder(gpt2()))) >= {"layers_0/attention/q/kernel"}
    with pytest.raises(InputError, match="layers_0/attention/q is not a layer of its own"):
        exported(tmp_path / "q", gpt2(), adapter_of(), {"layers_0/attention/q": zeros})
    assert not (tmp_path / "q").exists()


def test_nothing_to_export(tiny, tmp_path):
    empty = drawn({"layers_0/attention/q": {"a": (32, 0), "b": (0, 32)}})
    with pytest.raises(InputError, match="every rank"):
        exported(tmp_path / "peft", tiny[0].config, adapter_of(), empty, tiny[1])
    assert list(tmp_path.iterdir()) == []


def test_loras_own_scale(tiny, tmp_path):
    config = LoraConfig(rank=4, alpha=6.0, targets=("q",))
    frozen, trainable = make_adapter(config).init(jax.random.key(0), select(tiny[1], ("q",)), None)
    about, _ = exported(tmp_path / "peft", tiny[0].config, make_adapter(config), trainable, tiny[1])
    assert (about["r"], about["lora_alpha"]) == (4, 6.0)
