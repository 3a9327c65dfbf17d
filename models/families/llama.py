"""Llama (2302.13971) and every model of its layout: SmolLM2, Llama 2 and 3, DeepSeek-Coder, Yi as saved now (yi.py)."""

from collections.abc import Mapping
from typing import Any

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, NormConfig
from models.families.common import (
    BASE_GGUF,
    LLAMA_HF,
    Family,
    Row,
    activation,
    field,
    head_dim,
    read_rope,
    unpermute_k,
    unpermute_q,
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Llama config to ours."""
    bias = bool(config.get("attention_bias", False))
    attention = AttentionConfig(
        num_heads=field(config, "num_attention_heads"),
        num_kv_heads=config.get("num_key_value_heads") or field(config, "num_attention_heads"),
        head_dim=head_dim(config),
        qkv_bias=bias,
        out_bias=bias,
        rope=read_rope(config),
    )
    mlp = MLPConfig(
        field(config, "intermediate_size"),
        activation(config.get("hidden_act", "silu")),
        bias=bool(config.get("mlp_bias", False)),
    )
    norm = NormConfig("rms", config.get("rms_norm_eps", 1e-6))
    return DecoderConfig(
        family="llama",
        vocab_size=field(config, "vocab_size"),
        width=field(config, "hidden_size"),
        blocks=(BlockConfig(attention, mlp, norm),) * field(config, "num_hidden_layers"),
        max_length=field(config, "max_position_embeddings"),
        norm=norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    read_config=read_config,
    hf=LLAMA_HF,
    gguf=BASE_GGUF
    | {
        "layers_{i}/attention/q/kernel": Row("blk.{i}.attn_q.weight", unpermute_q),
        "layers_{i}/attention/k/kernel": Row("blk.{i}.attn_k.weight", unpermute_k),
        "layers_{i}/attention/q/bias": Row("blk.{i}.attn_q.bias", unpermute_q),
        "layers_{i}/attention/k/bias": Row("blk.{i}.attn_k.bias", unpermute_k),
    },
    ignored=(r"rotary_emb\.inv_freq$", r"^rope_freqs\.weight$"),
)
