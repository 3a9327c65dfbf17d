"""A small encoder in front of a large decoder that stays as it is: CodeT5+ 2B to 16B (2305.07922, section 3.3).

Both come from trained decoder-only models. The encoder keeps its own embedding and reads in both directions; a fresh
linear layer takes its output to the decoder's width; the last layers of the decoder get a fresh cross-attention behind
their self-attention, times a gate that starts at 0: before training the joined model computes, bit for bit, what the
decoder did. Only encoder, bridge and cross-attention are to be trained (`is_trained`).

Deviations. The paper's models are CodeGen on both sides; here they are whatever is at hand, as long as both read the
same tokens. The gate stands in the released code (`alpha_xattn`); the paper says that gating gave no gain. Cross
attention has the heads of the layer's self-attention, also where keys are shared by several.

Axis letters: L layers.
"""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from models.config import BlockConfig, DecoderConfig, EncoderDecoderConfig
from models.encoder_decoder import EncoderDecoder, init_params
from models.errors import InputError

_TRAINED = re.compile(r"(encoder|bridge|projection|matching)/|decoder/layers_\d+/cross")


@dataclasses.dataclass(frozen=True)
class JoinConfig:
    """An encoder in front of a decoder.

    Attributes:
        encoder: the model whose layers become the encoder, as `load_model` takes it; of the decoder's tokenizer.
        encoder_layers: of these, the first ones that are used; None: all of them.
        cross_layers: layers of the decoder, the last ones, that attend to what was read.
        start_token: what the written text begins with; the paper: the end of text.
    """

    encoder: str
    encoder_layers: int | None = None
    cross_layers: int = 1
    start_token: int = 0

    def __post_init__(self) -> None:
        if min(self.cross_layers, self.encoder_layers or 1) < 1 or self.start_token < 0 or self.encoder_layers == 0:
            raise InputError(
                "cross_layers and encoder_layers must be at least 1 and start_token 0, got "
                f"{self.cross_layers}, {self.encoder_layers} and {self.start_token}"
            )


class Part(NamedTuple):
    """One of the two models: its config and its parameters."""

    config: DecoderConfig
    params: dict[str, Any]


def join_config(encoder: DecoderConfig, decoder: DecoderConfig, settings: JoinConfig) -> EncoderDecoderConfig:
    """Returns the config of the joined model.

    Raises:
        InputError: more layers than there are, vocabularies of two sizes, or a start token in neither.
    """
    if settings.cross_layers > decoder.num_layers:
        raise InputError(
            f"cross_layers {settings.cross_layers} is more than the decoder's layers, {decoder.num_layers}"
        )
    if (settings.encoder_layers or 1) > encoder.num_layers:
        raise InputError(f"encoder_layers {settings.encoder_layers} is more than the encoder has, {encoder.num_layers}")
    if settings.start_token >= decoder.vocab_size:
        raise InputError(f"start_token {settings.start_token} is not one of the decoder's {decoder.vocab_size} tokens")
    encoder = dataclasses.replace(encoder, blocks=encoder.blocks[: settings.encoder_layers])
    first = decoder.num_layers - settings.cross_layers
    blocks = tuple(_crossed(block) if i >= first else block for i, block in enumerate(decoder.blocks))
    return EncoderDecoderConfig(
        encoder, dataclasses.replace(decoder, blocks=blocks), settings.start_token, own_embedding=True
    )


def _crossed(block: BlockConfig) -> BlockConfig:
    cross = dataclasses.replace(
        block.attention, rope=None, relative=None, window=None, softcap=None, qk_norm=False, scale=None
    )
    return dataclasses.replace(block, cross=cross, cross_gate=True)


def join(encoder: Part, decoder: Part, settings: JoinConfig, key: jax.Array) -> tuple[EncoderDecoder, dict[str, Any]]:
    """Returns the joined model and its parameters: those of both, and fresh ones where it has more.

    Args:
        encoder: what reads; its output matrix and the layers that are not used are left behind.
        decoder: what writes.
        settings: how they are joined.
        key: of the fresh parameters.
    """
    model = EncoderDecoder(join_config(encoder.config, decoder.config, settings))
    given = {f"decoder/{path}": value for path, value in flatten_dict(decoder.params, sep="/").items()}
    unused = (
        "unembedding/",
        *(f"layers_{i}/" for i in range(len(model.config.encoder.blocks), encoder.config.num_layers)),
    )
    read = flatten_dict(encoder.params, sep="/").items()
    given |= {f"encoder/{path}": value for path, value in read if not path.startswith(unused)}

    @jax.jit
    def fresh(key: jax.Array) -> dict[str, jax.Array]:
        made = flatten_dict(init_params(model, key), sep="/")
        return {path: value for path, value in made.items() if path not in given}

    return model, unflatten_dict({**fresh(key), **given}, sep="/")


def trained_apart(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (what stays, what is trained) of a joined model's parameters, or of their shapes."""
    flat = flatten_dict(params, sep="/")
    kept, trained = ({k: v for k, v in flat.items() if is_trained(k) == side} for side in (False, True))
    return unflatten_dict(kept, sep="/"), unflatten_dict(trained, sep="/")


def is_trained(path: str) -> bool:
    """Tells whether a parameter of a joined model, by its path, is one that training is to change."""
    return _TRAINED.match(path) is not None
