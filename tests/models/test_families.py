"""Every family variant against logits that transformers computed, and what a checkpoint that does not fit is told."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from models.cache import commit, init_cache
from models.errors import InputError
from models.weights.load import load_model
from tests.support.tiny_models import CONFIGS, LENGTHS, tokens, write_checkpoint

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN_FOLDER / "families.json").read_text())["shapes"]
MEANING = (
    "the logits of a tiny {} model are no longer those of transformers: the family's config reader, its name table or "
    "the decoder computes something else. Only if tests/golden/make_families.py was changed on purpose, run it again."
)


@pytest.fixture(scope="module")
def golden():
    """{variant: [f32[length, V] for each row]}."""
    with np.load(GOLDEN_FOLDER / "families.npz") as arrays:
        return {name: [arrays[f"{name}.{row}"] for row in range(len(LENGTHS))] for name in CONFIGS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{variant: a Hugging Face folder}."""
    root = tmp_path_factory.mktemp("families")
    for name, config in CONFIGS.items():
        write_checkpoint(root / name, config, SHAPES[name])
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def loaded(folders):
    """variant -> its LoadedModel, read once."""
    return functools.cache(lambda name: load_model(folders[name]))


def close(got, expected, name):
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4, err_msg=MEANING.format(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_full_forward(name, loaded, golden):
    model, params, _ = loaded(name)
    logits = model.apply({"params": params}, jnp.asarray(tokens())).logits
    for row, length in enumerate(LENGTHS):
        close(logits[row, :length], golden[name][row], name)


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_prefill_then_steps(name, loaded, golden):
    """The rows hold 9, 9 and 1 tokens after the prefill, then take one a step, each as long as it has any.

    Each pass runs 14 tokens a row and keeps fewer, so later slots are stale: never read, then written again.
    """
    model, params, _ = loaded(name)
    lengths, text = np.array(LENGTHS), np.pad(tokens(), ((0, 0), (0, 14)))
    cache = init_cache([block.attention for block in model.config.blocks], len(text), 28, jnp.float32)
    done, count = np.zeros_like(lengths), np.minimum(lengths, 9)
    while (done < lengths).any():
        chunk = text[np.arange(len(text))[:, None], done[:, None] + np.arange(14)]
        out = model.apply({"params": params}, jnp.asarray(chunk), None, cache)
        for row in range(len(text)):
            expected = golden[name][row][done[row] : done[row] + count[row]]
            close(out.logits[row, : count[row]], expected, name)
        cache = commit(out.cache, None, jnp.asarray(count, jnp.int32))
        done = done + count
        count = np.minimum(lengths - done, 1)
    np.testing.assert_array_equal(cache.length, LENGTHS)


def edit(folder, to, drop=(), add=None, config=None):
    """Copies a folder into one safetensors file, without some tensors, with some more, and with a changed config."""
    to.mkdir()
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items() if k not in drop}
    save_file(tensors | (add or {}), to / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | (config or {})
    (to / "config.json").write_text(json.dumps(values))
    return to


def test_unknown_architecture(folders, tmp_path):
    with pytest.raises(InputError, match="unknown model_type 'qwen9'. Did you mean 'qwen[23]'"):
        load_model(edit(folders["llama"], tmp_path / "m", config={"model_type": "qwen9"}))


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("variant", "change", "messages"),
    [
        (
            "llama",
            {"drop": ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]},
            ["without a tensor: final_norm/scale, layers_1/mlp/up/kernel", "without a parameter: none"],
        ),
        ("llama", {"add": {"model.extra.weight": ones(2)}}, ["without a parameter: model.extra.weight"]),
        ("llama", {"add": {"model.layers.3.input_layernorm.weight": ones(32)}}, [r"model\.layers\.3\.input_layernorm"]),
        ("qwen3", {"config": {"num_hidden_layers": 2}}, [r"model\.layers\.2\.\S+, .* and \d+ more"]),
        ("llama", {"config": {"num_hidden_layers": 5}}, [r"layers_3/\S+, .* and \d+ more"]),
        (
            "llama",
            {"config": {"intermediate_size": 40}},
            [r"mlp\.\w+_proj\.weight' gives layers_\d/mlp/\w+/kernel the shape \((32, 48|48, 32)\)", "config says"],
        ),
        ("gpt2", {"config": {"n_positions": 32}}, [r"wpe\.weight' gives positions/embedding the shape \(32, 64\)"]),
        ("qwen2", {"config": {"tie_word_embeddings": False}}, ["without a tensor: unembedding/kernel"]),
    ],
)
def test_checkpoints_that_do_not_fit(variant, change, messages, folders, tmp_path):
    with pytest.raises(InputError) as error:
        load_model(edit(folders[variant], tmp_path / "m", **change))
    for message in messages:
        error.match(message)


@pytest.mark.parametrize(
    ("variant", "add"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": ones(4)}),
        ("gpt2", {"transformer.h.0.attn.bias": ones(1, 1, 4, 4), "h.1.attn.masked_bias": ones(1)}),
        ("qwen2", {"lm_head.weight": ones(61, 32)}),
        ("gemma3", {"model.vision_tower.layer.weight": ones(2), "multi_modal_projector.x": ones(2)}),
    ],
)
def test_tensors_that_hold_no_parameter_are_passed_over(variant, add, loaded, folders, tmp_path):
    expected = flatten_dict(loaded(variant).params)
    got = flatten_dict(load_model(edit(folders[variant], tmp_path / "m", add=add)).params)
    assert set(got) == set(expected)
    assert all(np.array_equal(got[path], expected[path]) for path in expected)


def test_names_without_the_usual_prefix(loaded, folders, tmp_path):
    tensors = {k: v for path in folders["gpt2"].glob("*.safetensors") for k, v in load_file(path).items()}
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    folder = edit(folders["gpt2"], tmp_path / "m", drop=tensors, add=bare)
    got, expected = flatten_dict(load_model(folder).params), flatten_dict(loaded("gpt2").params)
    assert all(np.array_equal(got[path], expected[path]) for path in expected)


@pytest.fixture(scope="module")
def bfloat16_folder(folders, tmp_path_factory):
    tensors = {k: v for path in folders["llama"].glob("*.safetensors") for k, v in load_file(path).items()}
    half = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    return edit(folders["llama"], tmp_path_factory.mktemp("half") / "m", drop=tensors, add=half)


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ("float32", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtypes(stored, dtype, expected, loaded, folders, bfloat16_folder):
    params = flatten_dict(load_model(bfloat16_folder if stored == "bfloat16" else folders["llama"], dtype).params)
    wide = flatten_dict(loaded("llama").params)
    assert {value.dtype for value in params.values()} == {jnp.dtype(expected)}
    for path, value in params.items():
        exact, value = np.asarray(wide[path]), np.asarray(value)
        rounded = exact if {stored, expected} == {"float32"} else exact.astype(jnp.bfloat16)
        np.testing.assert_array_equal(value.astype(np.float32), rounded.astype(np.float32))


@pytest.mark.parametrize(
    ("variant", "expert"),
    [("mixtral", "block_sparse_moe.experts.3.w2"), ("qwen2_moe", "mlp.experts.4.down_proj")],
)
def test_a_missing_expert_is_named(variant, expert, folders, tmp_path):
    folder = edit(folders[variant], tmp_path / "m", drop=[f"model.layers.1.{expert}.weight"])
    with pytest.raises(InputError, match=rf"layers_1/mlp/experts_down \(of layers\.1\.{expert}\.weight\)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("variant", "config", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "olmoe with clip_qkv 8.0"),
        ("qwen2_moe", {"use_sliding_window": True}, "a qwen2_moe model with a sliding window"),
        ("mixtral", {"num_experts_per_tok": 5}, "top_k must be 1 to num_experts, 4; got 5"),
        ("mixtral", {"num_local_experts": 5}, r"experts_gate \(of layers\.0\.block_sparse_moe\.experts\.4\.w1"),
    ],
)
def test_mixtures_that_do_not_fit(variant, config, message, folders, tmp_path):
    with pytest.raises(InputError, match=message):
        load_model(edit(folders[variant], tmp_path / "m", config=config))
