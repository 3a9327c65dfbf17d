"""Gemma 3 text models (2503.19786): local and global layers with two rotary bases, norms on q and k and after each
branch.
"""

import math
from collections.abc import Mapping
from typing import Any

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, NormConfig, RopeConfig
from models.families.common import (
    BASE_GGUF,
    LLAMA_HF,
    Family,
    Row,
    activation,
    add_one,
    field,
    head_dim,
    keep,
    read_rope,
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Gemma 3 config (or the `text_config` inside a multimodal one) to ours."""
    if "text_config" in config:
        config = _TEXT_DEFAULTS | dict(config["text_config"])
    num_layers = field(config, "num_hidden_layers")
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(num_layers)
    ]
    norm = NormConfig("rms", config.get("rms_norm_eps", 1e-6))
    width = field(config, "hidden_size")
    return DecoderConfig(
        family="gemma3",
        vocab_size=field(config, "vocab_size"),
        width=width,
        blocks=tuple(_block(config, norm, local=kind == "sliding_attention") for kind in kinds),
        max_length=field(config, "max_position_embeddings"),
        norm=norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        embedding_scale=math.sqrt(width),
        logit_softcap=config.get("final_logit_softcapping"),
    )


# What the configs inside multimodal ones leave out: the defaults of Hugging Face's Gemma3TextConfig.
_TEXT_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}


def _block(config: Mapping[str, Any], norm: NormConfig, local: bool) -> BlockConfig:
    attention = AttentionConfig(
        num_heads=field(config, "num_attention_heads"),
        num_kv_heads=field(config, "num_key_value_heads"),
        head_dim=head_dim(config),
        qkv_bias=bool(config.get("attention_bias", False)),
        out_bias=bool(config.get("attention_bias", False)),
        qk_norm=True,
        rope=_rope(config, local),
        scale=(config.get("query_pre_attn_scalar") or _query_scalar(config)) ** -0.5,
        window=field(config, "sliding_window") if local else None,
    )
    mlp = MLPConfig(
        field(config, "intermediate_size"), activation(config.get("hidden_activation", "gelu_pytorch_tanh"))
    )
    return BlockConfig(attention, mlp, norm, post_norms=True)


def _query_scalar(config: Mapping[str, Any]) -> float:
    """GGUF files do not store it: it is Dh, but for the 27B model (62 layers), which uses D / H."""
    is_27b = config["num_hidden_layers"] == 62
    return config["hidden_size"] / config["num_attention_heads"] if is_27b else head_dim(config)


def _rope(config: Mapping[str, Any], local: bool) -> RopeConfig:
    """Newer configs keep `rope_parameters` per kind of layer; older ones have `rope_local_base_freq` for local ones."""
    by_kind = config.get("rope_parameters") or {}
    if "full_attention" in by_kind:
        parameters = by_kind["sliding_attention" if local else "full_attention"]
        return read_rope({**config, "rope_parameters": parameters}, default_theta=1e6)
    if local:
        return RopeConfig(config.get("rope_local_base_freq", 10_000.0))
    return read_rope(config, default_theta=1e6)


_NORMS = {
    "final_norm/scale": "norm.weight",
    "layers_{i}/attention_norm/scale": "layers.{i}.input_layernorm.weight",
    "layers_{i}/post_attention_norm/scale": "layers.{i}.post_attention_layernorm.weight",
    "layers_{i}/mlp_norm/scale": "layers.{i}.pre_feedforward_layernorm.weight",
    "layers_{i}/post_mlp_norm/scale": "layers.{i}.post_feedforward_layernorm.weight",
    "layers_{i}/attention/q_norm/scale": "layers.{i}.self_attn.q_norm.weight",
    "layers_{i}/attention/k_norm/scale": "layers.{i}.self_attn.k_norm.weight",
}

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    read_config=read_config,
    hf=LLAMA_HF | {path: Row(source, add_one) for path, source in _NORMS.items()},
    gguf=BASE_GGUF
    | {
        "layers_{i}/post_attention_norm/scale": Row("blk.{i}.post_attention_norm.weight", keep),
        "layers_{i}/post_mlp_norm/scale": Row("blk.{i}.post_ffw_norm.weight", keep),
    },
    ignored=(r"^(model\.)?vision_tower\.", r"^(model\.)?multi_modal_projector\."),
)
