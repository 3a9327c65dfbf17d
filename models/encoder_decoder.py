"""Encoder-decoders: one stack reads a text, another writes a second text and attends to the first.

Some can do more (CodeT5+, 2305.07922): give one vector for a whole text, so that texts can be looked up by it, and tell
whether two texts belong together. Some have no decoder and can do only the first.

Both stacks are those of `models.decoder`. A text is encoded once, and its cross-attention keys and values stand in the
cache beside the written text's own; from there on a forward pass has the form of any decoder's.

Axis letters: B batch, S tokens of the text that is read, T tokens of the one that is written, D width, V vocabulary,
E width of a text's vector.
"""

import dataclasses
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
from models.layers import Linear


class EncoderDecoder(nn.Module):
    """An encoder-decoder.

    Parameters: `encoder` and `decoder`, which holds the embedding of both where the encoder has none; `bridge`, from an
    encoder of another width; `projection` to a text's vector; `matching`. `embed`, `layers` and `unembed` are those of
    the decoder; `embed_source` and `read` are what goes before them.
    """

    config: EncoderDecoderConfig
    remat: bool = False

    def setup(self) -> None:
        """Makes the two stacks and the heads."""
        config = self.config
        self.encoder = Decoder(config.encoder, self.remat)
        self.decoder = Decoder(config.decoder, self.remat)
        if config.encoder.width != config.decoder.width:
            self.bridge = Linear(config.decoder.width, use_bias=True)
        if config.embedding_width is not None:
            self.projection = Linear(config.embedding_width, use_bias=True)
        if config.matching:
            self.matching = Linear(2, use_bias=True)

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
        return self.read(self.embed_source(tokens, next_positions(tokens, None)), lengths)

    def embed_source(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Maps tokens i32[B, S] of a text that is read, at positions i32[B, S], to the encoder's [B, S, D]."""
        return (self.encoder if self.config.own_embedding else self.decoder).embed(tokens, positions)

    def read(self, x: jax.Array, lengths: jax.Array) -> Encoded:
        """Does what `encode` does, from the embeddings [B, S, D] of a text."""
        return self.attended(self._outputs(x, lengths), lengths)

    def output(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns the encoder's output [B, S, D] of tokens i32[B, S], i32[B] of them in each row."""
        return self._outputs(self.embed_source(tokens, next_positions(tokens, None)), lengths)

    def _outputs(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        positions = next_positions(x, None)
        x = self.encoder.layers(x, positions, attend=bidirectional_attend, ctx=lengths)[0]
        return self.encoder.normed(x)

    def attended(self, x: jax.Array, lengths: jax.Array) -> Encoded:
        """Returns the encoder's output [B, S, D] as the cross attention of all layers reads it."""
        if self.config.reads_only:
            raise InputError(
                f"this {self.config.family} model is an encoder alone: it gives a text's vector and writes nothing; "
                "load a model with a decoder to generate"
            )
        bridged = x if self.config.encoder.width == self.config.decoder.width else self.bridge(x)
        return self.decoder.encoded(bridged, lengths)

    def vector(self, x: jax.Array) -> jax.Array:
        """Returns a text's vector f32[B, E], of length 1, from the encoder's output [B, S, D]: that of its first token.

        Source: CodeT5+ (2305.07922), section 3.2: v = l2norm(W h_[CLS]).
        """
        if self.config.embedding_width is None:
            raise InputError(f"this {self.config.family} model has no embedding_width: it gives no vector for a text")
        wide = self.projection(x[:, 0]).astype(jnp.float32)
        return wide * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(wide), -1, keepdims=True), 1e-24))

    def embed_text(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns the vector f32[B, E] of each text, tokens i32[B, S] of which i32[B] count."""
        return self.vector(self.output(tokens, lengths))

    def match(self, tokens: jax.Array, lengths: jax.Array, encoded: Encoded) -> jax.Array:
        """Returns logits f32[B, 2], that a written text does not and that it does belong to the one that was read.

        Args:
            tokens: i32[B, T], the task's token first and the end of text last.
            lengths: i32[B], of each row; the hidden state of the last of these is judged.
            encoded: the text that was read.
        """
        if not self.config.matching:
            raise InputError(f"this {self.config.family} model has no head that matches texts: its config has matching")
        x = self.written(tokens, encoded)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.matching(self.decoder.normed(last)).astype(jnp.float32)

    def written(self, tokens: jax.Array, encoded: Encoded) -> jax.Array:
        """Returns the residual stream [B, T, D] after the last block, of tokens i32[B, T] beside a text."""
        positions = next_positions(tokens, None)
        return self.decoder.layers(self.decoder.embed(tokens, positions), positions, encoded=encoded)[0]

    def every_part(self, tokens: jax.Array, lengths: jax.Array) -> None:
        """Uses every parameter, so that all are made."""
        x = self.output(tokens, lengths)
        if self.config.embedding_width is not None:
            self.vector(x)
        if not self.config.reads_only:
            encoded = self.attended(x, lengths)
            self.unembed(self.written(tokens, encoded))
            if self.config.matching:
                self.match(tokens, lengths, encoded)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Maps tokens i32[B, T] of the text that is written, at positions i32[B, T], to [B, T, D]."""
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
    if isinstance(model, EncoderDecoder):
        return model.init(key, tokens, jnp.ones((1,), jnp.int32), method="every_part")["params"]
    beside = (tokens, jnp.ones((1,), jnp.int32)) if isinstance(model, Dolphin) else ()
    return model.init(key, tokens, *beside)["params"]


def with_start(model: EncoderDecoder, token: int) -> EncoderDecoder:
    """Returns the same network, whose written text begins with another token."""
    return EncoderDecoder(dataclasses.replace(model.config, start_token=token), model.remat)


def decoder_only(model: Network, what: str) -> Decoder:
    """Returns the model; raises InputError, saying `what` needs it, where it is no plain decoder."""
    if isinstance(model, Dolphin):
        raise InputError(f"{what} needs a plain decoder, and this is a pair of decoders: take one of the two")
    if isinstance(model, EncoderDecoder):
        raise InputError(
            f"{what} needs a decoder-only model, and this {model.config.family} model is an encoder-decoder: choose "
            "another model, or decode with method 'greedy' or 'sample'"
        )
    return model
