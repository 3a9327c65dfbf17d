"""Encoder-decoders: one stack reads a text, another writes a second text and attends to the first.

Both stacks are those of `models.decoder`. A text is encoded once, and its cross-attention keys and values stand in the
cache beside the written text's own; from there on a forward pass has the form of any decoder's.

Axis letters: B batch, S tokens of the text that is read, T tokens of the one that is written, D width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import Attend, bidirectional_attend, dense_attend
from models.cache import Encoded, KVCache
from models.config import EncoderDecoderConfig, ModelConfig
from models.decoder import Decoder, Output, next_positions
from models.dolphin import Dolphin, DolphinConfig
from models.errors import InputError


class EncoderDecoder(nn.Module):
    """An encoder-decoder; parameters: `encoder` and `decoder`, which holds the embedding of both.

    `embed`, `layers` and `unembed` are those of the decoder; `read` is what goes before them.
    """

    config: EncoderDecoderConfig
    remat: bool = False

    def setup(self) -> None:
        """Makes the two stacks."""
        self.encoder = Decoder(self.config.encoder, self.remat)
        self.decoder = Decoder(self.config.decoder, self.remat)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        attend: Attend = dense_attend,
        ctx: Any = None,
        collect: tuple[int, ...] = (),
        source: tuple[jax.Array, jax.Array] | None = None,
    ) -> Output:
        """Runs the decoder on tokens i32[B, T], the start token first.

        Args:
            tokens: of the text that is written.
            positions: see `models.decoder.Decoder.layers` for this and the rest.
            cache: with the encoded text in it.
            attend: the attention policy of the decoder.
            ctx: its context.
            collect: residual streams of the decoder to return.
            source: without a cache, the text that is read: tokens i32[B, S] and their number in each row, i32[B].
        """
        if (cache is None) == (source is None):
            raise InputError("an encoder-decoder needs either a cache with the encoded text in it, or the text: source")
        encoded = None if source is None else self.encode(*source)
        return self.decoder(tokens, positions, cache, attend, ctx, collect, encoded)

    def encode(self, tokens: jax.Array, lengths: jax.Array) -> Encoded:
        """Reads tokens i32[B, S], i32[B] of them in each row, for the cross attention of all layers."""
        return self.read(self.embed(tokens, next_positions(tokens, None)), lengths)

    def read(self, x: jax.Array, lengths: jax.Array) -> Encoded:
        """Does what `encode` does, from the embeddings [B, S, D] of a text."""
        positions = next_positions(x, None)
        x = self.encoder.layers(x, positions, attend=bidirectional_attend, ctx=lengths)[0]
        return self.decoder.encoded(self.encoder.final_norm(x), lengths)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Maps tokens i32[B, T] at positions i32[B, T] to [B, T, D], for either stack."""
        return self.decoder.embed(tokens, positions)

    def layers(self, x: jax.Array, positions: jax.Array, *args: Any, **options: Any) -> Any:
        """Runs blocks of the decoder: see `models.decoder.Decoder.layers`."""
        return self.decoder.layers(x, positions, *args, **options)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Maps the residual stream after the decoder's last block, [..., D], to logits f32[..., V]."""
        return self.decoder.unembed(x)


Network = Decoder | EncoderDecoder | Dolphin


def network(config: ModelConfig | DolphinConfig, remat: bool = False) -> Network:
    """Returns the network of a config; see `models.decoder.Decoder` for `remat`."""
    kinds = {EncoderDecoderConfig: EncoderDecoder, DolphinConfig: Dolphin}
    return kinds.get(type(config), Decoder)(config, remat)


def writing_stack(model: Network, params: Any) -> tuple[Decoder, Any]:
    """Returns the stack that writes, with its parameters: of a plain decoder itself."""
    if isinstance(model, EncoderDecoder):
        return Decoder(model.config.decoder, model.remat), params["decoder"]
    if isinstance(model, Dolphin):
        return model.writer, params["main"]
    return model, params


def init_params(model: Network, key: jax.Array) -> dict[str, Any]:
    """Returns fresh parameters."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    source = {"source": (tokens, jnp.ones((1,), jnp.int32))} if isinstance(model, EncoderDecoder) else {}
    return model.init(key, tokens, **source)["params"]


def decoder_only(model: Network, what: str) -> Decoder:
    """Returns the model; raises InputError, saying `what` needs it, where it is no plain decoder."""
    if isinstance(model, EncoderDecoder):
        raise InputError(
            f"{what} needs a decoder-only model, and this {model.config.family} model is an encoder-decoder: choose "
            "another model, or decode with method 'greedy' or 'sample'"
        )
    return model
