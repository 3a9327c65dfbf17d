"""What the family files share: the row type of a name table, the tables most families start from, and config helpers.

A name table maps each of our parameter paths to the tensor it comes from and how that tensor is turned around. `{i}`
stands for the layer, `{e}` for an expert: a parameter that has it is made of all experts' tensors, stacked. Where
checkpoints differ in a tensor's name, a source has several, with | between them. Sources are named without the prefixes
in `PREFIXES`, which checkpoints carry or not, depending on who saved them. A table may have rows that a config does not
use (biases, an untied unembedding); every source tensor and every parameter must be used exactly once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from models.config import AttentionConfig, ModelConfig, RopeConfig, RopeScaling
from models.errors import InputError

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "transformer.")

Convert = Callable[[np.ndarray, AttentionConfig | None], np.ndarray]


class Row(NamedTuple):
    """Where a parameter comes from: the source tensor's name and the change of layout (given the layer's attention)."""

    source: str
    convert: Convert


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: how its configs are read and where its parameters stand.

    Attributes:
        name: as in `DecoderConfig.family`.
        model_types: the `model_type` values of Hugging Face configs that mean this family.
        read_config: maps a Hugging Face config.json (as a dict; for GGUF the same keys) to our config.
        hf: name table of Hugging Face checkpoints.
        gguf: name table of GGUF files (the family is found by `general.architecture`).
        ignored: regular expressions of source tensors that hold no parameter of ours.
        prefix: what stands before the names of `hf` in transformers' causal language model.
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    hf: Mapping[str, Row]
    gguf: Mapping[str, Row]
    ignored: tuple[str, ...] = ()
    prefix: str = "model."


def keep(x: np.ndarray, attention: AttentionConfig | None) -> np.ndarray:
    """The tensor as it is."""
    return x


def transpose(x: np.ndarray, attention: AttentionConfig | None) -> np.ndarray:
    """[out, in] to our [in, out]."""
    return x.T


def add_one(x: np.ndarray, attention: AttentionConfig | None) -> np.ndarray:
    """A norm scale that was stored with 1 subtracted (Gemma); exact to add in float32."""
    return x.astype(np.float32) + 1.0


def unpermute_q(x: np.ndarray, attention: AttentionConfig) -> np.ndarray:
    """Query rows from GGUF's interleaved rotary order back to the half-split order; then as `transpose`."""
    return _unpermute(x, attention.num_heads).T


def unpermute_k(x: np.ndarray, attention: AttentionConfig) -> np.ndarray:
    """As `unpermute_q`, for keys."""
    return _unpermute(x, attention.num_kv_heads).T


def _unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


LLAMA_HF: dict[str, Row] = {
    "embedding/embedding": Row("embed_tokens.weight", transpose),
    "final_norm/scale": Row("norm.weight", keep),
    "unembedding/kernel": Row("lm_head.weight", transpose),
    "layers_{i}/attention_norm/scale": Row("layers.{i}.input_layernorm.weight", keep),
    "layers_{i}/mlp_norm/scale": Row("layers.{i}.post_attention_layernorm.weight", keep),
    "layers_{i}/attention/q_norm/scale": Row("layers.{i}.self_attn.q_norm.weight", keep),
    "layers_{i}/attention/k_norm/scale": Row("layers.{i}.self_attn.k_norm.weight", keep),
    **{f"layers_{{i}}/attention/{x}/kernel": Row(f"layers.{{i}}.self_attn.{x}_proj.weight", transpose) for x in "qkvo"},
    **{f"layers_{{i}}/attention/{x}/bias": Row(f"layers.{{i}}.self_attn.{x}_proj.bias", keep) for x in "qkvo"},
    **{
        f"layers_{{i}}/mlp/{x}/kernel": Row(f"layers.{{i}}.mlp.{x}_proj.weight", transpose)
        for x in ("gate", "up", "down")
    },
    **{f"layers_{{i}}/mlp/{x}/bias": Row(f"layers.{{i}}.mlp.{x}_proj.bias", keep) for x in ("gate", "up", "down")},
}


def experts_hf(block: str, names: Mapping[str, str]) -> dict[str, Row]:
    """Returns the rows of a mixture of experts that stands under `block`; `names` are those of up, gate and down."""
    return {
        "layers_{i}/mlp/router/kernel": Row(f"layers.{{i}}.{block}.gate.weight", transpose),
        **{
            f"layers_{{i}}/mlp/experts_{ours}": Row(f"layers.{{i}}.{block}.experts.{{e}}.{theirs}.weight", transpose)
            for ours, theirs in names.items()
        },
    }


_GGUF_ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}

BASE_GGUF: dict[str, Row] = {
    "embedding/embedding": Row("token_embd.weight", transpose),
    "final_norm/scale": Row("output_norm.weight", keep),
    "unembedding/kernel": Row("output.weight", transpose),
    "layers_{i}/attention_norm/scale": Row("blk.{i}.attn_norm.weight", keep),
    "layers_{i}/mlp_norm/scale": Row("blk.{i}.ffn_norm.weight", keep),
    "layers_{i}/attention/q_norm/scale": Row("blk.{i}.attn_q_norm.weight", keep),
    "layers_{i}/attention/k_norm/scale": Row("blk.{i}.attn_k_norm.weight", keep),
    **{
        f"layers_{{i}}/attention/{x}/kernel": Row(f"blk.{{i}}.{y}.weight", transpose)
        for x, y in _GGUF_ATTENTION.items()
    },
    **{f"layers_{{i}}/attention/{x}/bias": Row(f"blk.{{i}}.{y}.bias", keep) for x, y in _GGUF_ATTENTION.items()},
    **{f"layers_{{i}}/mlp/{x}/kernel": Row(f"blk.{{i}}.ffn_{x}.weight", transpose) for x in ("gate", "up", "down")},
    **{f"layers_{{i}}/mlp/{x}/bias": Row(f"blk.{{i}}.ffn_{x}.bias", keep) for x in ("gate", "up", "down")},
}


def field(config: Mapping[str, Any], name: str) -> Any:
    """Returns a required field of a Hugging Face config."""
    if config.get(name) is None:
        raise InputError(f"the model's config has no {name!r}; a {config.get('model_type')} config needs it")
    return config[name]


def activation(name: str) -> str:
    """Returns our name of a Hugging Face activation."""
    names = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
    if name not in names:
        raise InputError(f"activation {name!r} is not supported; supported: {', '.join(names)}")
    return names[name]


def read_rope(config: Mapping[str, Any], default_theta: float = 10_000.0) -> RopeConfig:
    """Reads rotary positions in both spellings: `rope_theta` with `rope_scaling`, or one `rope_parameters`."""
    values = {"rope_theta": config.get("rope_theta", default_theta)}
    values |= config.get("rope_scaling") or {}
    values |= config.get("rope_parameters") or {}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return RopeConfig(values["rope_theta"])
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(f"rotary scaling {kind!r} is not supported; supported: default, linear, llama3, yarn")
    keys = {
        "original_length": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    }
    given = {ours: values[theirs] for ours, theirs in keys.items() if values.get(theirs) is not None}
    factor = values.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise InputError(f"rotary scaling {kind!r} needs a factor of at least 1, got {factor!r}")
    given.setdefault("original_length", field(config, "max_position_embeddings"))
    return RopeConfig(values["rope_theta"], RopeScaling(kind, factor, **given))


def head_dim(config: Mapping[str, Any]) -> int:
    """Returns Dh: given, or the width divided by the heads."""
    return config.get("head_dim") or field(config, "hidden_size") // field(config, "num_attention_heads")
