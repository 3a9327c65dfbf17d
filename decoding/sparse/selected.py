"""Attention over chosen slots of the cache: the cost grows with the number of chosen slots, not with the cache.

A *set* is a list of slots that some query heads of one key/value head share: all G of them, or one each. The new rows
of a tree (`models.attention.TreeRows`; one row in plain decoding) are not chosen but always seen, each by itself and by
its descendants.

The attention itself is `pallas_kernels.selected_attention`, which takes a kernel where one was measured to be faster,
and XLA's form elsewhere. XLA's it is wherever new rows share a list of which each sees its own part (windows of several
rows), since kernels show all rows of a list the same.

Axis letters: B batch, T new rows, W tree rows so far, S cache slots, H query heads, K key/value heads, G = H/K, J sets,
P query heads per set, N slots per set, Dh head width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from models.attention import TreeRows, append_rows
from models.cache import LayerCache
from models.config import AttentionConfig
from models.quantized_cache import QuantizedSlots, gathered
from pallas_kernels.flash_decode import ListHeads, Partials, gather_slots, masked_partials, normalize
from pallas_kernels.selected_attention import selected_attention

BLOCK = 128  # tokens of a prompt that share what they read


def query_heads(config: AttentionConfig, kv_heads: Sequence[int]) -> np.ndarray:
    """Returns i[J, G]: the query heads of some key/value heads."""
    group = config.num_heads // config.num_kv_heads
    return np.asarray(kv_heads, np.int32)[:, None] * group + np.arange(group, dtype=np.int32)


def taken_slots(cached: jax.Array | QuantizedSlots, slots: jax.Array, kv_heads: Sequence[int]) -> jax.Array:
    """Returns [B, J, N, Dh]: slots i32[B, J, N] of cached [B, K, S, Dh], codes as numbers; beyond S the nearest slot.

    J is the number of `kv_heads`, or a multiple of it: the first lists read the first of them, and so on.
    """
    batch, num_heads, _, _ = cached.shape
    table = ListHeads(slots.shape[1] // len(kv_heads), tuple(kv_heads), num_heads).table(batch)
    flat = rearrange(slots, "b j n -> (b j) n")
    taken = gathered(cached, lambda x: gather_slots(rearrange(x, "b k s d -> (b k) s d"), flat, table))
    return rearrange(taken, "(b j) n d -> b j n d", b=batch)


def listed_attention(
    q: jax.Array,
    cache: LayerCache,
    kv_heads: Sequence[int],
    slots: jax.Array,
    visible: jax.Array,
    config: AttentionConfig,
) -> jax.Array:
    """Softmax attention in float32 over sets of slots, by `pallas_kernels.selected_attention`.

    Of a cache of codes, for which there is no kernel, the slots are made numbers before its XLA form reads them.

    Args:
        q: [B, T, H, Dh], all heads of the layer.
        cache: keys and values, the new rows' included.
        kv_heads: the key/value heads to compute, in this order.
        slots: i32[B, T or 1, J, N], J as many as `kv_heads`, or G times as many: a set for each query head. No slot may
            stand in a set twice, unless hidden.
        visible: bool[B, T, J or 1, N], what is seen of them; one slot at least for each query.
        config: heads, scale and softcap.

    Returns:
        f32[B, T, K, G, Dh], K as many as `kv_heads`.
    """
    num_new, sets = q.shape[1], slots.shape[2] // len(kv_heads)
    visible = jnp.broadcast_to(visible, (*q.shape[:2], *slots.shape[2:]))
    rows = rearrange(q[:, :, query_heads(config, kv_heads)], "b t k (s p) d -> b k (s t p) d", s=sets)
    if slots.shape[1] < num_new:  # one list for all new rows, of which each sees its own part
        slots = rearrange(slots, "b 1 j n -> b j n")
        visible = repeat(visible, "b t j n -> b j (t p) n", p=rows.shape[2] // (sets * num_new))
    else:
        slots, visible = (rearrange(x, "b t j n -> b (j t) n") for x in (slots, visible))
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    options = {"scale": scale, "softcap": config.softcap}
    if isinstance(cache.k, QuantizedSlots):
        part = _over_codes(rows, cache, kv_heads, slots, visible, options)
    else:
        rows = rows.astype(cache.k.dtype)
        part = selected_attention(rows, cache.k, cache.v, slots, visible=visible, heads=kv_heads, **options)
    return rearrange(normalize(part), "b k (s t p) d -> b t k (s p) d", s=sets, t=num_new)


def _over_codes(rows, cache, kv_heads, slots, visible, options) -> Partials:
    """Returns what `selected_attention` does, for a cache of codes."""
    keys, values = (rearrange(taken_slots(x, slots, kv_heads), "b j n d -> (b j) n d") for x in (cache.k, cache.v))
    q = rearrange(rows.astype(jnp.float32), "b k (j r) d -> (b k j) r d", j=slots.shape[1] // rows.shape[1])
    seen = visible.reshape(len(keys), -1, visible.shape[-1])
    part = masked_partials(q, keys, values, seen, **options)
    return jax.tree.map(lambda x: x.reshape(*rows.shape[:3], *x.shape[2:]), part)


def with_tree(
    slots: jax.Array, visible: jax.Array, start: jax.Array, rows: TreeRows, num_new: int
) -> tuple[jax.Array, jax.Array]:
    """Adds the rows of the tree to sets of committed slots.

    Args:
        slots: i32[B, T or 1, J, N].
        visible: bool[B, T or 1, J or 1, N].
        start: i32[B], committed tokens; the tree's rows stand behind them.
        rows: the tree.
        num_new: T.

    Returns:
        (i32[B, T or 1, J, N + W], bool[B, T, J or 1, N + W]).
    """
    width = rows.ancestors.shape[-1]
    behind = (start[:, None] + jnp.arange(width)[None, :])[:, None, None, :]
    behind = jnp.broadcast_to(behind, (*slots.shape[:3], width))
    ancestors = jnp.broadcast_to(rows.ancestors[:, :, None], (len(start), num_new, visible.shape[2], width))
    visible = jnp.broadcast_to(visible, (*ancestors.shape[:3], slots.shape[3]))
    return jnp.concatenate([slots, behind], axis=3), jnp.concatenate([visible, ancestors], axis=3)


def window_attention(
    q: jax.Array,
    cache: LayerCache,
    rows: TreeRows,
    config: AttentionConfig,
    *,
    sink: int,
    local: int,
    kv_heads: Sequence[int],
) -> jax.Array:
    """Attention to the first `sink` positions and the last `local` ones, a row's own included: streaming heads.

    Args:
        q: [B, T, H, Dh], all heads of the layer.
        cache: the layer's cache with the new rows written, its length the one before them.
        rows: how the new rows hang together.
        config: scale and softcap.
        sink: first positions seen, 0 or more.
        local: last positions seen, 1 or more; a window of the layer's own in place of both: sink 0, local the window.
        kv_heads: the key/value heads to compute, in this order.

    Returns:
        f32[B, T, J, G, Dh], J as many as `kv_heads`.
    """
    num_new, start, num_slots = q.shape[1], cache.length, cache.k.shape[2]
    sink, reach = min(sink, num_slots), min(local, num_slots)
    positions = start[:, None] + rows.depth  # i32[B, W]
    oldest = positions[:, -num_new:] - local  # the last position that a new row does not see
    last = start[:, None] + jnp.arange(1 - reach, 0)[None, :]
    first = jnp.broadcast_to(jnp.arange(sink)[None, :], (len(start), sink))
    slots = jnp.concatenate([first, last], axis=1)[:, None, None, :]
    far = (jnp.arange(sink + reach - 1) >= sink)[None, None, None, :]
    visible = (slots >= jnp.where(far, sink, 0)) & (slots < start[:, None, None, None])
    visible = visible & (~far | (slots > oldest[:, :, None, None]))
    slots = jnp.broadcast_to(slots, (len(start), 1, len(kv_heads), slots.shape[-1]))
    near = (positions[:, None, :] > oldest[:, :, None]) | (positions < sink)[:, None, :]
    seen = rows.replace(ancestors=rows.ancestors & near)
    slots, visible = with_tree(slots, visible, start, seen, num_new)
    return listed_attention(q, cache, kv_heads, slots, visible, config)


def chain(num_rows: int) -> TreeRows:
    """Returns tokens that follow each other, as rows of a tree."""
    return TreeRows(jnp.tril(jnp.ones((1, num_rows, num_rows), bool)), jnp.arange(num_rows)[None, :])


def chunk_attention(
    q: jax.Array, cache: LayerCache, config: AttentionConfig, *, sink: int, local: int, kv_heads: Sequence[int]
) -> jax.Array:
    """`window_attention` of many tokens that follow each other: block by block, each with what its rows see.

    A token costs sink + local + `BLOCK` products, however long the text is. `pallas_kernels.block_sparse_prefill` does
    not serve here: its windows are whole blocks and its prompts begin at slot 0, while a window here is one of tokens
    and a prompt is read `decoding.prefill.CHUNK` tokens at a time; and its XLA form has the cost of dense attention.
    """
    parts = []
    for first in range(0, q.shape[1], BLOCK):
        part, behind = q[:, first : first + BLOCK], cache.replace(length=cache.length + first)
        rows = chain(part.shape[1])
        parts.append(window_attention(part, behind, rows, config, sink=sink, local=local, kv_heads=kv_heads))
    return jnp.concatenate(parts, axis=1)


def own_window(q, k, v, cache, ctx: TreeRows, *, config, layer):
    """The policy of a layer with a sliding window: exact, and as cheap as the window is short. See
    `models.attention.Attend` for the arguments.
    """
    cache = append_rows(cache, k, v, ctx)
    kv_heads = range(config.num_kv_heads)
    out = window_attention(q, cache, ctx, config, sink=0, local=config.window, kv_heads=kv_heads)
    return merged(out, q), cache, ctx


def merged(out: jax.Array, q: jax.Array) -> jax.Array:
    """Returns out f32[B, T, J, P, Dh], its sets in the order of heads, as [B, T, H, Dh] in q's dtype."""
    return out.reshape(q.shape).astype(q.dtype)
