"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, plain MLPs, biases everywhere, q k v in one tensor."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, NormConfig
from models.families.common import Convert, Family, Row, activation, field, keep, transpose


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face GPT-2 config to ours."""
    width, heads = field(config, "n_embd"), field(config, "n_head")
    attention = AttentionConfig(heads, heads, width // heads, qkv_bias=True, out_bias=True, rope=None)
    mlp = MLPConfig(
        config.get("n_inner") or 4 * width,
        activation(config.get("activation_function", "gelu_new")),
        gated=False,
        bias=True,
    )
    norm = NormConfig("layer", config.get("layer_norm_epsilon", 1e-5))
    return DecoderConfig(
        family="gpt2",
        vocab_size=field(config, "vocab_size"),
        width=width,
        blocks=(BlockConfig(attention, mlp, norm),) * field(config, "n_layer"),
        max_length=field(config, "n_positions"),
        norm=norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        learned_positions=True,
    )


def _third(index: int, turn: Convert) -> Convert:
    """One of q, k, v out of the fused tensor, whose output axis is the last one after `turn`."""

    def convert(x: np.ndarray, attention: AttentionConfig | None) -> np.ndarray:
        return np.split(turn(x, attention), 3, axis=-1)[index]

    return convert


def _table(names: Mapping[str, str], turn: Convert) -> dict[str, Row]:
    """Returns the name table; `turn` brings a stored matrix to [in, out]."""
    table = {
        "embedding/embedding": Row(names["embedding"] + ".weight", transpose),
        "positions/embedding": Row(names["positions"] + ".weight", transpose),
        "unembedding/kernel": Row(names["unembedding"] + ".weight", transpose),
    }
    for path in ("final_norm", "layers_{i}/attention_norm", "layers_{i}/mlp_norm"):
        table[f"{path}/scale"] = Row(names[path] + ".weight", keep)
        table[f"{path}/bias"] = Row(names[path] + ".bias", keep)
    for path in ("attention/o", "mlp/up", "mlp/down"):
        table[f"layers_{{i}}/{path}/kernel"] = Row(names[path] + ".weight", turn)
        table[f"layers_{{i}}/{path}/bias"] = Row(names[path] + ".bias", keep)
    for index, letter in enumerate("qkv"):
        table[f"layers_{{i}}/attention/{letter}/kernel"] = Row(names["qkv"] + ".weight", _third(index, turn))
        table[f"layers_{{i}}/attention/{letter}/bias"] = Row(names["qkv"] + ".bias", _third(index, keep))
    return table


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    read_config=read_config,
    hf=_table(
        {
            "embedding": "wte",
            "positions": "wpe",
            "unembedding": "lm_head",
            "final_norm": "ln_f",
            "layers_{i}/attention_norm": "h.{i}.ln_1",
            "layers_{i}/mlp_norm": "h.{i}.ln_2",
            "qkv": "h.{i}.attn.c_attn",
            "attention/o": "h.{i}.attn.c_proj",
            "mlp/up": "h.{i}.mlp.c_fc",
            "mlp/down": "h.{i}.mlp.c_proj",
        },
        keep,
    ),
    gguf=_table(
        {
            "embedding": "token_embd",
            "positions": "position_embd",
            "unembedding": "output",
            "final_norm": "output_norm",
            "layers_{i}/attention_norm": "blk.{i}.attn_norm",
            "layers_{i}/mlp_norm": "blk.{i}.ffn_norm",
            "qkv": "blk.{i}.attn_qkv",
            "attention/o": "blk.{i}.attn_output",
            "mlp/up": "blk.{i}.ffn_up",
            "mlp/down": "blk.{i}.ffn_down",
        },
        transpose,
    ),
    ignored=(r"\.attn\.(masked_)?bias$",),
    prefix="transformer.",
)
