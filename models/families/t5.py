"""T5 (1910.10683), T5 v1.1 and Flan-T5 (2210.11416), CodeT5 and CodeT5+ 220M and 770M (2305.07922): encoder-decoders
with relative position biases, unscaled attention and RMSNorm. v1.1 and its successors have gated MLPs and an output
matrix of their own. Of CodeT5+ there are also an encoder alone, which gives a vector for a text, and a 220M model with
that projection and a head that matches texts; transformers itself has neither, and their code comes with the files.
"""

from collections.abc import Mapping
from typing import Any

from models.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    EncoderDecoderConfig,
    MLPConfig,
    NormConfig,
    RelativeConfig,
)
from models.families.common import Family, Row, activation, field, keep, transpose

EMBEDDING, BIMODAL = "codet5p_embedding", "codet5p_bimodal"


def read_config(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    """Maps a Hugging Face T5 config to ours."""
    layers, kind = field(config, "num_layers"), config.get("model_type")
    written = 0 if kind == EMBEDDING else config.get("num_decoder_layers") or layers
    tied = bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)))
    return EncoderDecoderConfig(
        encoder=_stack(config, layers, tied, encoder=True),
        decoder=_stack(config, written, tied, encoder=False),
        start_token=config.get("decoder_start_token_id") or config.get("pad_token_id") or 0,
        embedding_width=field(config, "embed_dim") if kind in (EMBEDDING, BIMODAL) else None,
        matching=kind == BIMODAL,
    )


def _stack(config: Mapping[str, Any], num_layers: int, tied: bool, encoder: bool) -> DecoderConfig:
    width, heads = field(config, "d_model"), field(config, "num_heads")
    relative = RelativeConfig(
        config.get("relative_attention_num_buckets", 32), config.get("relative_attention_max_distance", 128), encoder
    )
    norm = NormConfig("rms", config.get("layer_norm_epsilon", 1e-6))
    cross = AttentionConfig(heads, heads, field(config, "d_kv"), rope=None, scale=1.0)
    attention = AttentionConfig(heads, heads, field(config, "d_kv"), rope=None, relative=relative, scale=1.0)
    block = BlockConfig(attention, _mlp(config), norm, cross=None if encoder else cross)
    return DecoderConfig(
        family="t5",
        vocab_size=field(config, "vocab_size"),
        width=width,
        blocks=(block,) * num_layers,
        max_length=config.get("n_positions") or 512,
        norm=norm,
        tied_embeddings=tied,
        logit_scale=width**-0.5 if tied else 1.0,
    )


def _mlp(config: Mapping[str, Any]) -> MLPConfig:
    """`feed_forward_proj` is "relu", or "gated-" and an activation, where "gelu" means its tanh form."""
    kind = config.get("feed_forward_proj", "relu")
    name = kind.removeprefix("gated-")
    tanh = kind == "gated-gelu"
    return MLPConfig(field(config, "d_ff"), "gelu_tanh" if tanh else activation(name), gated=kind != name)


def _stack_table(ours: str) -> dict[str, Row]:
    """The rows of one stack; the decoder's cross attention stands between its attention and its MLP."""
    block, last = f"{ours}.block.{{i}}.layer", 1 if ours == "encoder" else 2
    table = {
        f"{ours}/relative_bias/embedding": Row(
            f"{ours}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", transpose
        ),
        f"{ours}/final_norm/scale": Row(f"{ours}.final_layer_norm.weight", keep),
        f"{ours}/layers_{{i}}/attention_norm/scale": Row(f"{block}.0.layer_norm.weight", keep),
        f"{ours}/layers_{{i}}/cross_norm/scale": Row(f"{block}.1.layer_norm.weight", keep),
        f"{ours}/layers_{{i}}/mlp_norm/scale": Row(f"{block}.{last}.layer_norm.weight", keep),
    }
    for path, name in (("attention", "0.SelfAttention"), ("cross", "1.EncDecAttention")):
        for x in "qkvo":
            table[f"{ours}/layers_{{i}}/{path}/{x}/kernel"] = Row(f"{block}.{name}.{x}.weight", transpose)
    for x, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
        source = f"{block}.{last}.DenseReluDense.{name}.weight"
        also = f"|{source.replace('wi_1', 'wi')}" if x == "up" else ""  # where it is not gated
        table[f"{ours}/layers_{{i}}/mlp/{x}/kernel"] = Row(source + also, transpose)
    return table


FAMILY = Family(
    name="t5",
    model_types=("t5", EMBEDDING, BIMODAL),
    read_config=read_config,
    hf={
        "decoder/embedding/embedding": Row("shared.weight", transpose),
        "decoder/unembedding/kernel": Row("lm_head.weight", transpose),
        "projection/kernel": Row("proj.weight", transpose),
        "projection/bias": Row("proj.bias", keep),
        "matching/kernel": Row("itm_head.weight", transpose),
        "matching/bias": Row("itm_head.bias", keep),
        **_stack_table("encoder"),
        **_stack_table("decoder"),
    },
    gguf={},
    ignored=(r"^(encoder|decoder)\.embed_tokens\.weight$", r"EncDecAttention\.relative_attention_bias\.weight$"),
    prefix="",
)
