"""The decoder-only model: the one implementation behind every family of `models.families`.

`embed`, `layers` and `unembed` are the three parts of a forward pass; calling the model chains them. Everything it
needs is an argument and everything it makes is returned, so a caller can run some of the layers, feed embeddings in
place of tokens, roll the cache back, or hand in another attention policy.

Axis letters: B batch, T query length, D model width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from models.attention import Attend, Attention, CrossAttention, dense_attend
from models.cache import Encoded, KVCache, LayerCache
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MoEConfig
from models.layers import MLP, Embedding, Linear, Norm, RelativeBias, relative_buckets, rotary_table, softcap
from models.moe import MoE


@struct.dataclass
class Output:
    """What a forward pass returns.

    Attributes:
        logits: f32[B, T, V].
        hidden: {i: [B, T, D]} for each requested i: the residual stream before layer i (0 is the embedding, L the last
            layer's output).
        cache: the cache with T rows written and its length unchanged (`models.cache.commit` moves it), or None.
        aux: the attend policy's context after the last layer.
    """

    logits: jax.Array
    hidden: dict[int, jax.Array]
    cache: KVCache | None
    aux: Any


@struct.dataclass
class Inserted:
    """Embeddings that stand in place of tokens: in row b at positions start[b] to start[b] + N - 1.

    Attributes:
        values: [B, N, D], on the scale of embedded tokens: what a config does to embeddings is not done to them.
        start: i32[B].
    """

    values: jax.Array
    start: jax.Array

    def within(self, positions: jax.Array) -> jax.Array:
        """Returns bool[B, T]: which of the positions i32[B, T] are those of inserted embeddings."""
        place = positions - self.start[:, None]
        return (place >= 0) & (place < self.values.shape[1])

    def at(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what `Decoder.embed` takes for tokens i32[B, T] at positions i32[B, T] with these in their places."""
        place = jnp.clip(positions - self.start[:, None], 0, self.values.shape[1] - 1)
        instead = jnp.take_along_axis(self.values, place[..., None], axis=1)
        return jnp.where(self.within(positions), -1, tokens), positions, instead


class Block(nn.Module):
    """One pre-norm transformer block: [B, T, D] -> [B, T, D]."""

    config: BlockConfig
    width: int  # D

    def setup(self) -> None:
        """Makes the branches and their norms."""
        config = self.config
        self.attention_norm, self.mlp_norm = Norm(config.norm), Norm(config.norm)
        self.attention = Attention(config.attention, config.norm)
        self.mlp = (MoE if isinstance(config.mlp, MoEConfig) else MLP)(config.mlp)
        if config.post_norms:
            self.post_attention_norm, self.post_mlp_norm = Norm(config.norm), Norm(config.norm)
        if config.cross is not None:
            self.cross_norm, self.cross = Norm(config.norm), CrossAttention(config.cross, self.width)
            if config.cross_gate:
                self.cross_gate = self.param("cross_gate", nn.initializers.zeros, ())

    def __call__(self, x, rotary, cache, attend: Attend, ctx, layer: int, bias=None, text: LayerCache | None = None):
        """Returns (x, cache, ctx) after the block: see `models.attention.Attention`, and `CrossAttention` for text."""
        out, cache, ctx = self.attention(self.attention_norm(x), rotary, cache, attend, ctx, layer, bias)
        x = x + (self.post_attention_norm(out) if self.config.post_norms else out)
        if self.config.cross is not None:
            found = self.cross(self.cross_norm(x), text)
            x = x + (self.cross_gate.astype(x.dtype) * found if self.config.cross_gate else found)
        out = self.mlp(self.mlp_norm(x))
        return x + (self.post_mlp_norm(out) if self.config.post_norms else out), cache, ctx


class Decoder(nn.Module):
    """A decoder-only transformer.

    Parameters: `embedding`, `positions` (when learned), `layers_0`.., `relative_bias` (where blocks have one; it is the
    same for all), `final_norm`, `unembedding` (when not tied).
    With `remat`, a backward pass computes each block again from what entered it, in place of keeping what is inside.
    """

    config: DecoderConfig
    remat: bool = False

    def setup(self) -> None:
        """Makes the submodules; blocks are unrolled, so that a layer can be reached by its index."""
        config = self.config
        self.embedding = Embedding(config.vocab_size, config.width)
        if config.learned_positions:
            self.positions = Embedding(config.max_length, config.width)
        block_class = nn.remat(Block, static_argnums=(4, 6)) if self.remat else Block
        for index, block in enumerate(config.blocks):
            setattr(self, f"layers_{index}", block_class(block, config.width))
        relative = {(b.attention.relative, b.attention.num_heads) for b in config.blocks if b.attention.relative}
        if relative:
            ((table, heads),) = relative
            self.relative_bias = Embedding(table.num_buckets, heads)
        self.final_norm = Norm(config.norm)
        if not config.tied_embeddings:
            self.unembedding = Linear(config.vocab_size, dtype=jnp.float32)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        attend: Attend = dense_attend,
        ctx: Any = None,
        collect: tuple[int, ...] = (),
        encoded: Encoded | None = None,
        instead: jax.Array | None = None,
    ) -> Output:
        """Runs the whole model on tokens i32[B, T].

        See `embed` and `layers` for the arguments, and `Output` for what comes back.
        """
        positions = next_positions(tokens, cache) if positions is None else positions
        x = self.embed(tokens, positions, instead)
        x, hidden, cache, aux = self.layers(x, positions, cache, attend, ctx, collect=collect, encoded=encoded)
        return Output(self.unembed(x), hidden, cache, aux)

    def embed(self, tokens: jax.Array, positions: jax.Array, instead: jax.Array | None = None) -> jax.Array:
        """Maps tokens i32[B, T] at positions i32[B, T] to the residual stream [B, T, D].

        Where a token is negative, `instead` [B, T, D] stands in place of its embedding (scaled, without its position).
        """
        x = self.embedding(tokens)
        x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        x = x if instead is None else jnp.where(tokens[..., None] < 0, instead.astype(x.dtype), x)
        return x + self.positions(positions) if self.config.learned_positions else x

    def layers(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: KVCache | None = None,
        attend: Attend = dense_attend,
        ctx: Any = None,
        *,
        start: int = 0,
        stop: int | None = None,
        collect: tuple[int, ...] = (),
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, dict[int, jax.Array], KVCache | None, Any]:
        """Runs blocks start..stop-1.

        Args:
            x: [B, T, D] residual stream before block `start`.
            positions: i32[B, T] rotary positions of the T tokens.
            cache: the whole model's cache, or None when the T tokens are all there is.
            attend: the attention policy.
            ctx: the policy's context before block `start`.
            start: first block to run.
            stop: one past the last block to run; None runs to the end.
            collect: which residual streams to return, by the index of the block they enter (L: after the last one).
            encoded: the text that cross attention reads, where no cache holds it.

        Returns:
            (x, {i: hidden}, cache, ctx) after block stop-1.
        """
        stop = self.config.num_layers if stop is None else stop
        ropes = {(b.attention.rope, b.attention.head_dim) for b in self.config.blocks[start:stop]}
        tables = {rope: rotary_table(*rope, positions) for rope in ropes if rope[0] is not None}
        encoded = encoded if cache is None else cache.encoded
        hidden = {}
        for index in range(start, stop):
            if index in collect:
                hidden[index] = x
            config = self.config.blocks[index]
            attention, bias = config.attention, self._bias(config.attention)
            layer_cache = None if cache is None else cache.layer(index)
            block = getattr(self, f"layers_{index}")
            rotary = tables.get((attention.rope, attention.head_dim))
            text = None if config.cross is None else encoded.layer(index)
            x, layer_cache, ctx = block(x, rotary, layer_cache, attend, ctx, index, bias, text)
            cache = None if cache is None else cache.with_layer(index, layer_cache)
        if stop in collect:
            hidden[stop] = x
        return x, hidden, cache, ctx

    def encoded(self, x: jax.Array, lengths: jax.Array) -> Encoded:
        """Returns an encoder's output [B, S, D], of texts of i32[B] tokens, as the cross attention of all layers."""
        layers = [getattr(self, f"layers_{index}") for index in range(self.config.num_layers)]
        pairs = [(None, None) if layer.config.cross is None else layer.cross.keys_values(x) for layer in layers]
        return Encoded(*(tuple(values) for values in zip(*pairs, strict=True)), lengths)

    def _bias(self, attention: AttentionConfig) -> RelativeBias | None:
        if attention.relative is None:
            return None
        return RelativeBias(jnp.take(self.relative_bias.embedding, relative_buckets(attention.relative), axis=1))

    def unembed(self, x: jax.Array) -> jax.Array:
        """Maps the residual stream after the last block, [..., D], to logits f32[..., V]."""
        return self.scores(self.normed(x))

    def normed(self, x: jax.Array) -> jax.Array:
        """Returns the residual stream after the last block under the final norm: what the unembedding reads."""
        return self.final_norm(x)

    def scores(self, x: jax.Array) -> jax.Array:
        """Maps what the unembedding reads, [..., D], to logits f32[..., V]."""
        logits = self.embedding.scores(x) if self.config.tied_embeddings else self.unembedding(x)
        return softcap(logits * self.config.logit_scale, self.config.logit_softcap)


def next_positions(tokens: jax.Array, cache: KVCache | None) -> jax.Array:
    """Returns i32[B, T]: the positions of T tokens that follow what is in the cache (or start from 0 without one)."""
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    start = jnp.zeros((tokens.shape[0], 1), jnp.int32) if cache is None else cache.length[:, None]
    return start + steps
