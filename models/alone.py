"""The parts of an encoder-decoder, each by itself: an encoder for looking texts up, a decoder for going on with them.

CodeT5+ (2305.07922, sections 3.1 and 4) uses its decoder alone with an encoder that reads one token, `[CLM]`. A query
that may look at one place only always finds the same, so cross-attention to such a text adds one vector per layer,
whatever is written: here it is added to the bias of the self-attention's output, and the decoder becomes a plain one,
to which every way of decoding applies.

Axis letters: B batch, S tokens of the text that is read, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.decoder import Decoder
from models.encoder_decoder import EncoderDecoder
from models.errors import InputError
from models.kernels import as_kernel


def encoder_alone(model: EncoderDecoder, params: dict[str, Any]) -> tuple[EncoderDecoder, dict[str, Any]]:
    """Returns the model that only reads, and its share of the parameters; it gives the same vectors for texts.

    Raises:
        InputError: the model gives no vectors (`EncoderDecoderConfig.embedding_width`).
    """
    config = model.config
    if config.embedding_width is None:
        raise InputError(f"this {config.family} model has no embedding_width: alone its encoder would be of no use")
    bare = dataclasses.replace(config.decoder, blocks=())
    kept = {name: params[name] for name in ("encoder", "projection")}
    if not config.own_embedding:
        kept["decoder"] = {"embedding": params["decoder"]["embedding"]}
        kept["decoder"] |= {name: params["decoder"][name] for name in ("positions",) if name in params["decoder"]}
    return EncoderDecoder(dataclasses.replace(config, decoder=bare, matching=False), model.remat), kept


def decoder_alone(model: EncoderDecoder, params: dict[str, Any], token: int) -> tuple[Decoder, dict[str, Any]]:
    """Returns the decoder beside an encoder that has read one token, as a decoder-only model.

    Its logits are those of the encoder-decoder with `source` this token, to rounding. A text that it goes on with is to
    begin with `model.config.start_token`.

    Args:
        model: with a decoder.
        params: its parameters.
        token: what the encoder reads, below V.

    Raises:
        InputError: no such token, or a model without a decoder.
    """
    config = model.config
    if not 0 <= token < config.vocab_size:
        raise InputError(f"the token that is read must be 0 to {config.vocab_size - 1}, got {token}")
    if any(block.post_norms for block in config.decoder.blocks):
        raise InputError("a norm stands behind the attention of this decoder: it cannot take up cross-attention")
    source = jnp.full((1, 1), token, jnp.int32), jnp.ones((1,), jnp.int32)
    text = model.apply({"params": params}, *source, method="encode")
    blocks, found = [], dict(params["decoder"])
    for index, block in enumerate(config.decoder.blocks):
        name = f"layers_{index}"
        if block.cross is not None:
            found[name] = _with_bias(found[name], block.cross, text.v[index])
            block = dataclasses.replace(
                block, cross=None, cross_gate=False, attention=dataclasses.replace(block.attention, out_bias=True)
            )
        blocks.append(block)
    return Decoder(dataclasses.replace(config.decoder, blocks=tuple(blocks)), model.remat), found


def _with_bias(layer: dict[str, Any], cross: Any, values: jax.Array) -> dict[str, Any]:
    """Returns a layer without cross-attention: what that finds, of values [1, K, 1, Dh], is added to a bias [D]."""
    heads = jnp.repeat(values[0, :, 0], cross.num_heads // cross.num_kv_heads, axis=0).reshape(1, -1)
    out = layer["cross"]["o"]
    vector = as_kernel(out["kernel"]).dot(heads)[0] + out.get("bias", jnp.zeros((), values.dtype))
    vector = layer.get("cross_gate", jnp.ones((), values.dtype)) * vector
    kept = {name: value for name, value in layer.items() if name not in ("cross", "cross_norm", "cross_gate")}
    before = layer["attention"]["o"]
    bias = before.get("bias", jnp.zeros((), vector.dtype)) + vector
    return {**kept, "attention": {**layer["attention"], "o": {**before, "bias": bias}}}
