"""Dolphin (2408.15518): a small decoder reads a long context into a few embeddings, which a large decoder reads in its
place.

The compressor reads the context and behind it N memory tokens, whose embeddings are trained; its last hidden states at
these, under the final norm, go through an MLP into the space of the main decoder's embeddings (section 3.2). The main
decoder finds them where the context would stand, at consecutive positions. Only vectors pass from one to the other, so
the two may have different vocabularies.

Both decoders are those of `models.decoder`. The paper gives the projector as "an MLP"; here it is two linear layers
with a GELU between them, as wide as the main decoder, the usual form of models that read images so.

Axis letters: B batch, P tokens of a padded context, N memory tokens, D width of the main decoder.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.cache import KVCache
from models.config import DecoderConfig
from models.decoder import Decoder, Inserted, next_positions
from models.errors import InputError
from models.layers import Linear, kernel_init

PARTS = ("memory", "projector")  # what is new beside the two decoders
_SAMPLE = 48  # tokens of the contexts that the projector's scale is measured on


@dataclasses.dataclass(frozen=True)
class DolphinConfig:
    """A pair of decoders.

    Attributes:
        compressor: the decoder that reads contexts.
        main: the decoder that reads what comes of them, and writes.
        memory: N, memory tokens (32 in the released weights).
    """

    compressor: DecoderConfig
    main: DecoderConfig
    memory: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.memory < min(self.compressor.max_length, self.main.max_length):
            raise InputError(
                f"memory must be at least 1 token and leave room for others in the contexts of both models, "
                f"{self.compressor.max_length} and {self.main.max_length} tokens; got {self.memory}"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return self.compressor.max_length - self.memory

    @property
    def family(self) -> str:
        """The name of such pairs."""
        return "dolphin"

    @property
    def vocab_size(self) -> int:
        """V of what is written."""
        return self.main.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens that the main decoder reads and writes, the memory included."""
        return self.main.max_length


class Projector(nn.Module):
    """last(gelu(first(x))): [..., width of the compressor] -> [..., D]."""

    width: int  # D

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the compressor's hidden states to embeddings of the main decoder."""
        x = nn.gelu(Linear(self.width, use_bias=True, name="first")(x))
        return Linear(self.width, use_bias=True, name="last")(x)


class Dolphin(nn.Module):
    """The pair; parameters: `compressor`, `main`, `memory` [N, width of the compressor], `projector`."""

    config: DolphinConfig
    remat: bool = False

    def setup(self) -> None:
        """Makes the decoders and what stands between them."""
        config = self.config
        self.compressor, self.main = Decoder(config.compressor, self.remat), Decoder(config.main, self.remat)
        self.memory = self.param("memory", kernel_init, (config.memory, config.compressor.width))
        self.projector = Projector(config.main.width)

    @property
    def writer(self) -> Decoder:
        """The main decoder as a model of its own; its parameters are `params["main"]`."""
        return Decoder(self.config.main, self.remat)

    @property
    def reader(self) -> Decoder:
        """The compressor as a model of its own; its parameters are `params["compressor"]`."""
        return Decoder(self.config.compressor, self.remat)

    def __call__(self, tokens: jax.Array, contexts: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns logits f32[B, T, V] of tokens i32[B, T] that follow the memory of contexts; see `compress`."""
        memory = self.compress(contexts, lengths)
        start = jnp.zeros_like(lengths)
        tokens = jnp.pad(tokens, ((0, 0), (self.config.memory, 0)))
        positions = next_positions(tokens, None)
        x = self.main.embed(*Inserted(memory, start).at(tokens, positions))
        return self.main.unembed(self.main.layers(x, positions)[0])[:, self.config.memory :]

    def embed(self, tokens: jax.Array, positions: jax.Array, instead: jax.Array | None = None) -> jax.Array:
        """Maps tokens to embeddings of the main decoder: see `models.decoder.Decoder.embed`."""
        return self.main.embed(tokens, positions, instead)

    def layers(self, x: jax.Array, positions: jax.Array, *args: Any, **options: Any) -> Any:
        """Runs blocks of the main decoder: see `models.decoder.Decoder.layers`."""
        return self.main.layers(x, positions, *args, **options)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Maps the residual stream after the main decoder's last block, [..., D], to logits f32[..., V]."""
        return self.main.unembed(x)

    def compress(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Returns the memory of contexts, [B, N, D], read in one pass.

        Args:
            tokens: i32[B, P] of the compressor's vocabulary; what stands behind a context is read by nobody.
            lengths: i32[B], tokens of each context, 0 to P.
        """
        tokens = jnp.pad(tokens, ((0, 0), (0, self.config.memory)))
        positions = next_positions(tokens, None)
        x = self.compressor.layers(self._embed(tokens, positions, lengths), positions)[0]
        places = lengths[:, None] + jnp.arange(self.config.memory)[None, :]
        return self._project(jnp.take_along_axis(x, places[..., None], axis=1))

    def digest(self, cache: KVCache) -> jax.Array:
        """Returns the memory of contexts that stand in a cache of the compressor, [B, N, D].

        The same as `compress`, for contexts that were read in some other way; the cache has N slots to spare.
        """
        tokens = jnp.zeros((len(cache.length), self.config.memory), jnp.int32)
        positions = next_positions(tokens, cache)
        return self._project(self.compressor.layers(self._embed(tokens, positions, cache.length), positions, cache)[0])

    def _embed(self, tokens: jax.Array, positions: jax.Array, start: jax.Array) -> jax.Array:
        """Returns the compressor's embeddings with the memory tokens at `start`: rows of its table like any other."""
        rows = self.memory.astype(self.compressor.embedding.embedding.dtype)
        rows = rows * jnp.asarray(self.config.compressor.embedding_scale, rows.dtype)
        values = jnp.broadcast_to(rows, (len(start), *rows.shape))
        return self.compressor.embed(*Inserted(values, start).at(tokens, positions))

    def _project(self, x: jax.Array) -> jax.Array:
        return self.projector(self.compressor.normed(x))


def with_memory(model: Dolphin, key: jax.Array, compressor: Any, main: Any) -> dict[str, Any]:
    """Returns parameters of a pair whose memory and projector are new.

    Memory tokens start as the mean of the compressor's embeddings and noise of their spread; the last layer of the
    projector is scaled so that memory is, on average over a few contexts, as large as the main decoder's embeddings:
    larger ones would stall training.

    Args:
        model: the pair.
        key: of what is random.
        compressor: parameters of the compressor; kept as they are.
        main: parameters of the main decoder; likewise.
    """
    keys = jax.random.split(key, 3)
    table = compressor["embedding"]["embedding"].astype(jnp.float32)
    noise = jax.random.normal(keys[0], (model.config.memory, table.shape[0]), jnp.float32)
    memory = table.mean(axis=1)[None, :] + noise * table.std(axis=1)[None, :]
    fresh = Projector(model.config.main.width).init(keys[1], jnp.zeros((1, table.shape[0]), jnp.float32))["params"]
    params = {"compressor": compressor, "main": main, "memory": memory, "projector": fresh}
    count = min(_SAMPLE, model.config.longest)
    tokens = jax.random.randint(keys[2], (2, count), 0, model.config.compressor.vocab_size, jnp.int32)
    lengths = jnp.full((2,), count, jnp.int32)
    made = jax.jit(lambda params: model.apply({"params": params}, tokens, lengths, method="compress"))(params)
    wanted = _size(main["embedding"]["embedding"]) * model.config.main.embedding_scale
    scale = wanted / jnp.maximum(_size(made), jnp.finfo(jnp.float32).tiny)
    last = {**fresh["last"], "kernel": fresh["last"]["kernel"] * scale}
    return {**params, "projector": {**fresh, "last": last}}


def _size(x: jax.Array) -> jax.Array:
    """Returns the root of the mean square, f32[]."""
    return jnp.linalg.norm(x.astype(jnp.float32)) / math.sqrt(x.size)
