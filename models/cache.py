"""The KV cache as a value.

Rows of a batch differ in length and nothing is padded to the slowest row: row b holds `length[b]` tokens in slots
0..length[b]-1, slot i holding position i. Slots from `length[b]` on are stale: finite, and hidden by the length. A
forward pass writes its keys and values at slots length..length+T-1 and leaves `length` alone; the caller then says
which of those rows stay (`commit`).

Axis letters: B batch, S slots, K key/value heads, Dh head width, W rows of one forward pass, C rows kept at most.
Layers are stored [B, K, S, Dh]: each head's keys are one contiguous matrix; or as `models.quantized_cache` says, in few
bits.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from models.config import AttentionConfig
from models.quantized_cache import stored_like


@struct.dataclass
class LayerCache:
    """One layer's part of the cache.

    Attributes:
        k: [B, K, S, Dh] keys, already rotated; an array, or `QuantizedSlots`.
        v: [B, K, S, Dh] values.
        length: i32[B], tokens already in the cache (the same array for every layer).
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


@struct.dataclass
class Encoded:
    """A text as a decoder's cross attention reads it: made once, never changed.

    Attributes:
        k: one [B, K, S, Dh] array of keys per layer; None for layers that do not attend to it.
        v: the same of values.
        length: i32[B], the text's tokens; later slots are padding.
    """

    k: tuple[jax.Array | None, ...]
    v: tuple[jax.Array | None, ...]
    length: jax.Array

    def layer(self, index: int) -> LayerCache:
        """Returns the part of layer `index`."""
        return LayerCache(self.k[index], self.v[index], self.length)


@struct.dataclass
class KVCache:
    """The cache of a whole model.

    Attributes:
        k: one [B, K, S, Dh] array per layer.
        v: one [B, K, S, Dh] array per layer.
        length: i32[B], tokens already in the cache.
        encoded: what an encoder has read, or None where there is none.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length: jax.Array
    encoded: Encoded | None = None

    @property
    def num_slots(self) -> int:
        """S, the tokens that fit."""
        return self.k[0].shape[2]

    def layer(self, index: int) -> LayerCache:
        """Returns the part of layer `index`."""
        return LayerCache(self.k[index], self.v[index], self.length)

    def with_layer(self, index: int, layer: LayerCache) -> "KVCache":
        """Returns the cache with the keys and values of layer `index` replaced."""
        k, v = list(self.k), list(self.v)
        k[index], v[index] = layer.k, layer.v
        return self.replace(k=tuple(k), v=tuple(v))


def init_cache(layers: Sequence[AttentionConfig], batch: int, num_slots: int, dtype: jnp.dtype) -> KVCache:
    """Returns an empty cache of `num_slots` slots per row for the given attention layers."""
    shapes = [(batch, layer.num_kv_heads, num_slots, layer.head_dim) for layer in layers]
    return KVCache(
        k=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        v=tuple(jnp.zeros(shape, dtype) for shape in shapes),
        length=jnp.zeros((batch,), jnp.int32),
    )


def append(layer: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array | None = None) -> LayerCache:
    """Writes k, v: [B, T, K, Dh] at slots start..start+T-1 of each row (None: from the length on); the length stays.

    The caller keeps start + T <= S: like any dynamic slice, a write that would pass the end is moved back until it
    fits.
    """
    start = layer.length if start is None else start
    write = functools.partial(_write, start=start)
    return layer.replace(
        k=jax.tree.map(write, layer.k, stored_like(layer.k, k)), v=jax.tree.map(write, layer.v, stored_like(layer.v, v))
    )


def commit(cache: KVCache, rows: jax.Array | None, count: jax.Array) -> KVCache:
    """Keeps `count[b]` of the rows that the last forward pass wrote behind row b's length.

    Args:
        cache: the cache that the forward pass returned; `length` is still the one before the pass.
        rows: i32[B, C] or None. Row index (0 = first written) of each kept token in order; entries from `count` on are
            ignored. None keeps the first `count` rows where they are (a chain needs no moving).
        count: i32[B], between 0 and C.

    Rotary phases stay right when a tree row moves: it was rotated with position length + depth, the slot it moves to.
    """
    if rows is not None:
        move = functools.partial(_compact, rows=rows, start=cache.length)
        cache = cache.replace(k=jax.tree.map(move, cache.k), v=jax.tree.map(move, cache.v))
    return cache.replace(length=cache.length + count)


def repeat_rows(tree: Any, times: int) -> Any:
    """Returns a pytree of [B, ...] arrays with `times` copies of each row side by side: [B * times, ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def gather_rows(tree: Any, parent: jax.Array) -> Any:
    """Returns a pytree of [B * W, ...] arrays (a cache among them) whose beams go on from others.

    Args:
        tree: any pytree; W rows side by side belong together.
        parent: i32[B, W]; beam i of row b becomes what beam parent[b, i] of that row was.
    """

    def gather(x):
        beams = x.reshape(*parent.shape, *x.shape[1:])
        index = parent.reshape(*parent.shape, *(1,) * (x.ndim - 1))
        return jnp.take_along_axis(beams, index, axis=1, mode="clip").reshape(x.shape)

    return jax.tree.map(gather, tree)


def _write(buffer: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """buffer [B, K, S, Dh], values [B, T, K, Dh], start i32[B]."""
    heads = buffer.shape[1]
    rows = rearrange(buffer, "b k s d -> (b k) s d")
    values = rearrange(values, "b t k d -> (b k) t d")
    write = jax.vmap(lambda row, new, slot: jax.lax.dynamic_update_slice(row, new, (slot, 0)))
    return rearrange(write(rows, values, jnp.repeat(start, heads)), "(b k) s d -> b k s d", k=heads)


def _compact(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    """Moves rows start+rows to start, start+1, ... in each batch row."""
    slots = start[:, None] + rows
    kept = jnp.take_along_axis(buffer, slots[:, None, :, None], axis=2, mode="clip")
    return _write(buffer, jnp.swapaxes(kept, 1, 2), start)
