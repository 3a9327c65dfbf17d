"""GGUF files, written here from the weights of the tiny Hugging Face models as llama.cpp's converter would write them.

Tensor names come from the gguf package's own map, so a wrong entry in a family's table shows.
"""

import json
import string
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from models.config import RopeScaling
from models.decoder import Decoder
from models.errors import InputError
from models.weights.gguf import GGUFFile, load_parameters
from models.weights.load import load_model
from tests.support.tiny_models import CONFIGS, tokens, weights, write_checkpoint

SHAPES = json.loads((Path(__file__).parents[2] / "golden" / "families.json").read_text())["shapes"]
SCALARS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "final_logit_softcapping": "final_logit_softcapping",
}
GPT2_SCALARS = {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer"}
GPT2_SCALARS |= {"attention.head_count": "n_head", "feed_forward_length": "n_inner"}

GEMMA = {k: v for k, v in CONFIGS["gemma3"].items() if k not in ("layer_types", "rope_parameters")}
VARIANTS = {
    "llama": CONFIGS["llama"],
    "llama_linear": {**CONFIGS["llama_linear"], "rope_theta": 10_000.0},
    "qwen2": {**CONFIGS["qwen2"], "tie_word_embeddings": False, "rope_theta": 1000.0},
    "qwen3": {**CONFIGS["qwen3"], "rope_theta": 5000.0},
    "gemma3": {
        **GEMMA,
        "num_hidden_layers": 6,
        "rope_theta": 5000.0,
        "query_pre_attn_scalar": 16,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "gpt2": {**CONFIGS["gpt2"], "n_inner": 128},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {
    **CONFIGS["llama"],
    "rope_theta": 500_000.0,
    "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
}


def shapes_of(name, config):
    """The golden model's shapes with the config's number of layers and feed-forward width."""
    golden = SHAPES[name]
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    mlp = config.get("intermediate_size")
    made = {}
    for tensor, shape in golden.items():
        copies = range(layers) if ".0." in tensor else [None]
        if any(f".{i}." in tensor for i in range(1, 10)):
            continue
        for i in copies:
            made[tensor if i is None else tensor.replace(".0.", f".{i}.")] = tuple(mlp if n == 48 else n for n in shape)
    if not config.get("tie_word_embeddings", True):
        made["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return made


def permuted(x, heads):
    """What llama.cpp's converter does to q and k, whose rotation there pairs neighbours."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def converted(architecture, config, tensors):
    """{GGUF name: array} of {Hugging Face name: array}."""
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, layers)
    made = {}
    for name, value in tensors.items():
        if architecture == "llama" and "q_proj" in name:
            value = permuted(value, config["num_attention_heads"])
        if architecture == "llama" and "k_proj" in name:
            value = permuted(value, config["num_key_value_heads"])
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + np.float32(1)
        if architecture == "gpt2" and name.endswith(("attn.weight", "c_proj.weight", "c_fc.weight")):
            value = value.T
        made[names.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(value)
    return made


def write(path, config, tensors, kind=Type.F32, drop=(), more=None, architecture=None):
    """Writes a GGUF file; matrices are stored as `kind`, and `drop` lists metadata left out."""
    architecture = architecture or config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in (GPT2_SCALARS if "n_embd" in config else SCALARS).items():
        if config.get(field) is not None and key not in drop:
            add = writer.add_float32 if isinstance(config[field], float) else writer.add_uint32
            add(f"{architecture}.{key}", config[field])
    if "n_embd" in config:
        writer.add_float32("gpt2.attention.layer_norm_epsilon", 1e-5)
    if config.get("rope_scaling", {}).get("rope_type") == "linear":
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
        writer.add_float32(f"{architecture}.rope.scaling.factor", config["rope_scaling"]["factor"])
    for add, key, value in more or ():
        getattr(writer, f"add_{add}")(key, value)
    for name, value in tensors.items():
        stored = kind if value.ndim == 2 else Type.F32
        writer.add_tensor(name, gguf.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(folder, variant, config=None, kind=Type.F32):
    """The same model as a Hugging Face folder and as a GGUF file."""
    config = config or VARIANTS[variant]
    shapes = shapes_of(variant, config)
    write_checkpoint(folder / "hf", config, shapes)
    tensors = converted(config["model_type"].removesuffix("_text"), config, weights(shapes))
    return folder / "hf", write(folder / "m.gguf", config, tensors, kind)


def loaded(path):
    file = GGUFFile(path)
    return Decoder(file.config), load_parameters(file, None)


def logits(model, params):
    return np.asarray(model.apply({"params": params}, jnp.asarray(tokens())).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_hugging_face_folder(variant, tmp_path):
    folder, path = pair(tmp_path, variant)
    expected, (model, params) = load_model(folder), loaded(path)
    assert jax.tree.structure(params) == jax.tree.structure(expected.params)
    assert model.config.max_length == 64 and model.config.num_layers == expected.model.config.num_layers
    np.testing.assert_allclose(
        logits(model, params), logits(expected.model, expected.params), atol=1e-5, rtol=1e-5, err_msg=variant
    )


def test_unpermuted_queries_would_show(tmp_path):
    """The negative control: a llama file whose q rows are not in llama.cpp's order gives other logits."""
    config = VARIANTS["llama"]
    tensors = converted("llama", config, weights(shapes_of("llama", config)))
    right, wrong = (
        loaded(write(tmp_path / f"{i}.gguf", config, tensors | more))
        for i, more in enumerate(({}, {"blk.0.attn_q.weight": permuted(tensors["blk.0.attn_q.weight"], 4)}))
    )
    assert np.abs(logits(*right) - logits(*wrong)).max() > 0.05


@pytest.mark.parametrize(
    ("kind", "error"), [(Type.F16, 1e-3), (Type.BF16, 5e-3), (Type.Q8_0, 2e-2), (Type.Q4_1, 0.2)], ids=str
)
def test_stored_types(kind, error, tmp_path, monkeypatch):
    """Matrices come back within the type's rounding, in float32; in chunks as in one piece."""
    config = {**CONFIGS["llama"], "intermediate_size": 64}
    folder, path = pair(tmp_path, "llama", config, kind)
    expected, params = load_model(folder), loaded(path)[1]
    for got, exact in zip(jax.tree.leaves(params), jax.tree.leaves(expected.params), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, atol=error * np.abs(exact).max())
    assert GGUFFile(path).read("blk.0.ffn_up.weight").dtype == np.float32
    monkeypatch.setattr("models.weights.gguf._CHUNK", 100)
    again = loaded(path)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def llama3_factors(config, head_dim=8):
    """How much slower each frequency runs, by the rule of Llama 3.1."""
    scaling, made = config["rope_scaling"], []
    for frequency in config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim):
        rotations = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = np.clip((rotations - low) / (high - low), 0, 1)
        made.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(made, np.float32)


def test_llama3_factors_are_recognised(tmp_path):
    shapes = shapes_of("llama", LLAMA3)
    write_checkpoint(tmp_path / "hf", LLAMA3, shapes)
    tensors = converted("llama", LLAMA3, weights(shapes)) | {"rope_freqs.weight": llama3_factors(LLAMA3)}
    assert 1 < tensors["rope_freqs.weight"][2] < 8, "one frequency is blended"
    model, params = loaded(write(tmp_path / "m.gguf", LLAMA3, tensors))
    assert model.config.blocks[0].attention.rope.scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    expected = load_model(tmp_path / "hf")
    np.testing.assert_allclose(logits(model, params), logits(expected.model, expected.params), atol=1e-5, rtol=1e-5)


def test_other_factors_are_refused(tmp_path):
    factors = llama3_factors(LLAMA3)
    factors[1] *= 1.5
    tensors = converted("llama", LLAMA3, weights(shapes_of("llama", LLAMA3))) | {"rope_freqs.weight": factors}
    with pytest.raises(InputError, match="rope_freqs.weight does not follow the llama3 rule with factor 8"):
        loaded(write(tmp_path / "m.gguf", LLAMA3, tensors))


def test_factors_without_a_base(llama_tensors, tmp_path):
    """A file without rope.freq_base means 10,000; these factors belong to another base."""
    tensors = llama_tensors | {"rope_freqs.weight": llama3_factors(LLAMA3)}
    with pytest.raises(InputError, match="rope_freqs.weight"):
        loaded(write(tmp_path / "m.gguf", LLAMA3, tensors, drop=["rope.freq_base"]))


@pytest.fixture(scope="module")
def llama_tensors():
    return converted("llama", CONFIGS["llama"], weights(shapes_of("llama", CONFIGS["llama"])))


@pytest.fixture(scope="module")
def llama_bytes(llama_tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", CONFIGS["llama"], llama_tensors).read_bytes()


def damaged(data):
    """{what is wrong: the file's bytes}."""
    noise = np.random.default_rng(0).bytes(2000)
    cuts = {f"cut to {share:.0%}": data[: int(share * len(data))] for share in (0.001, 0.01, 0.02, 0.5, 0.99)}
    return {"empty": b"", "three bytes": b"GGU", "noise": noise, "noise behind the magic": data[:8] + noise, **cuts}


@pytest.mark.parametrize("what", damaged(b""))
def test_damaged_files(what, llama_bytes, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(damaged(llama_bytes)[what])
    with pytest.raises(
        InputError, match=r"m\.gguf is not a readable GGUF file \(cut short or damaged\?.*fetch it again"
    ):
        load_model(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file: .*nothing.gguf"):
        GGUFFile(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "lama"}, "unknown model_type 'lama'. Did you mean 'llama'"),
        ({"drop": ["block_count"]}, "no 'num_hidden_layers'"),
        ({"drop": ["attention.head_count"]}, "no 'num_attention_heads'"),
    ],
)
def test_files_of_no_known_model(change, message, llama_tensors, tmp_path):
    path = write(tmp_path / "m.gguf", CONFIGS["llama"], llama_tensors, **change)
    with pytest.raises(InputError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("blk.1.ffn_up.weight", {}, "without a tensor: layers_1/mlp/up/kernel"),
        ("token_embd.weight", {}, "no 'vocab_size'"),
        (None, {"blk.0.attn_k.weight": np.ones((7, 32), np.float32)}, "attn_k.weight"),
        (None, {"blk.0.ffn_gate_inp.weight": np.ones((4, 32), np.float32)}, "without a parameter: blk.0.ffn_gate_inp"),
        (
            "blk.0.attn_norm.weight",
            {"blk.0.attn_norm.weight": np.ones(7, np.float32)},
            r"the shape \(7,\), but .* \(32,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(drop, add, message, llama_tensors, tmp_path):
    tensors = {name: value for name, value in llama_tensors.items() if name != drop} | add
    with pytest.raises(InputError, match=message):
        loaded(write(tmp_path / "m.gguf", CONFIGS["llama"], tensors))


def test_a_type_that_cannot_be_dequantised(llama_bytes, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(llama_bytes)

    def refuse(data, kind):
        raise NotImplementedError(kind.name)

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(InputError, match=r"m\.gguf: tensor '\S+' has type F32, which .* cannot dequantise; convert"):
        loaded(path)


def test_a_whole_file_with_its_tokenizer(llama_tensors, tmp_path):
    """load_model takes config, weights and tokenizer from the one file, in the wanted dtype."""
    letters = [*string.ascii_letters, *"0123456"]
    tokenizer = [
        ("string", "tokenizer.ggml.model", "gpt2"),
        ("string", "tokenizer.ggml.pre", "gpt-2"),
        ("array", "tokenizer.ggml.tokens", ["<eos>", *letters, "ab"]),
        ("array", "tokenizer.ggml.token_type", [3] + [1] * 60),
        ("array", "tokenizer.ggml.merges", ["a b"]),
        ("uint32", "tokenizer.ggml.eos_token_id", 0),
    ]
    path = write(tmp_path / "m.gguf", CONFIGS["llama"], llama_tensors, more=tokenizer)
    model, params, tokenizer = load_model(path, "bfloat16")
    assert model.config.vocab_size == tokenizer.vocab_size == 61 and tokenizer.eos_id == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
