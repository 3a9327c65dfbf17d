"""Attention over chosen slots of the cache: the cost grows with the number of chosen slots, not with the cache.

A *set* is a list of slots that some query heads of one key/value head share: all G of them, or one each. The new rows
of a tree (`models.attention.TreeRows`; one row in plain decoding) are not chosen but always seen, each by itself and by
its descendants.

Axis letters: B batch, T new rows, W tree rows so far, S cache slots, H query heads, K key/value heads, G = H/K, J sets,
P query heads per set, N slots per set, Dh head width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from models.attention import TreeRows, append_rows, scaled, visible_softmax
from models.cache import LayerCache
from models.config import AttentionConfig
from models.kernels import PRECISION
from models.quantized_cache import QuantizedSlots, gathered

BLOCK = 128  # tokens of a prompt that share what they read


def rows_of_sets(config: AttentionConfig, shared: bool, kv_heads: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns which heads the sets are for.

    Args:
        config: the layer.
        shared: whether all query heads of a key/value head share a set.
        kv_heads: the key/value heads that have sets.

    Returns:
        (i[J, P] query heads of each set, i[J] its key/value head).
    """
    group = config.num_heads // config.num_kv_heads
    kv = np.asarray(kv_heads, np.int32)
    heads = kv[:, None] * group + np.arange(group, dtype=np.int32)
    return (heads, kv) if shared else (heads.reshape(-1, 1), np.repeat(kv, group))


def gather_slots(cached: jax.Array | QuantizedSlots, kv_heads: np.ndarray, slots: jax.Array) -> jax.Array:
    """Returns [B, X, J, N, Dh]: slots i32[B, X, J, N] of cached [B, K, S, Dh], set j from head kv_heads[j].

    Slots out of range give the nearest one. Rows are taken from one long list: a gather along the axis S of some heads
    would copy these heads first.
    """
    batch, num_heads, num_slots, _ = cached.shape
    first = (jnp.arange(batch, dtype=jnp.int32)[:, None] * num_heads + kv_heads[None, :]) * num_slots
    rows = first[:, None, :, None] + jnp.clip(slots, 0, num_slots - 1)
    return gathered(cached, lambda x: x.reshape(-1, x.shape[3]).at[rows].get(mode="promise_in_bounds"))


def selected_attention(
    q: jax.Array,
    cache: LayerCache,
    kv_heads: np.ndarray,
    slots: jax.Array,
    visible: jax.Array,
    config: AttentionConfig,
) -> jax.Array:
    """Softmax attention in float32 over sets of slots.

    Args:
        q: [B, T, J, P, Dh], the queries by set.
        cache: keys and values, the new rows' included.
        kv_heads: i[J], the key/value head that each set reads.
        slots: i32[B, T or 1, J, N]. No slot may stand in a set twice, unless hidden.
        visible: bool[B, T, J or 1, N], what is seen of them; one slot at least for each query.
        config: scale and softcap.

    Returns:
        f32[B, T, J, P, Dh].
    """
    num_rows = q.shape[1]
    visible = jnp.broadcast_to(visible, (*q.shape[:3], slots.shape[-1]))[:, :, :, None]
    if slots.shape[1] != num_rows:  # one list for all rows: they become more queries of one set
        q = rearrange(q, "b t j p d -> b 1 j (t p) d")
        visible = jnp.repeat(rearrange(visible, "b t j 1 n -> b 1 j t n"), q.shape[3] // num_rows, axis=3)
    batch, rows, sets = q.shape[:3]
    keys = rearrange(gather_slots(cache.k, kv_heads, slots), "b t j n d -> (b t j) n d")
    values = rearrange(gather_slots(cache.v, kv_heads, slots), "b t j n d -> (b t j) n d")
    products = _products("xpd,xnd->xpn", rearrange(q, "b t j p d -> (b t j) p d"), keys)
    scores = rearrange(scaled(products, config), "(b t j) p n -> b t j p n", b=batch, t=rows)
    weights = rearrange(visible_softmax(scores, visible), "b t j p n -> (b t j) p n").astype(values.dtype)
    out = rearrange(_products("xpn,xnd->xpd", weights, values), "(b t j) p d -> b t j p d", b=batch, t=rows)
    return out if rows == num_rows else rearrange(out, "b 1 j (t p) d -> b t j p d", t=num_rows)


def _products(equation: str, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum(equation, one, other, precision=PRECISION, preferred_element_type=jnp.float32)


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
    heads, kv = rows_of_sets(config, True, kv_heads)
    positions = start[:, None] + rows.depth  # i32[B, W]
    oldest = positions[:, -num_new:] - local  # the last position that a new row does not see
    last = start[:, None] + jnp.arange(1 - reach, 0)[None, :]
    first = jnp.broadcast_to(jnp.arange(sink)[None, :], (len(start), sink))
    slots = jnp.concatenate([first, last], axis=1)[:, None, None, :]
    far = (jnp.arange(sink + reach - 1) >= sink)[None, None, None, :]
    visible = (slots >= jnp.where(far, sink, 0)) & (slots < start[:, None, None, None])
    visible = visible & (~far | (slots > oldest[:, :, None, None]))
    slots = jnp.broadcast_to(slots, (len(start), 1, len(kv), slots.shape[-1]))
    near = (positions[:, None, :] > oldest[:, :, None]) | (positions < sink)[:, None, :]
    seen = rows.replace(ancestors=rows.ancestors & near)
    slots, visible = with_tree(slots, visible, start, seen, num_new)
    return selected_attention(q[:, :, heads], cache, kv, slots, visible, config)


def chain(num_rows: int) -> TreeRows:
    """Returns tokens that follow each other, as rows of a tree."""
    return TreeRows(jnp.tril(jnp.ones((1, num_rows, num_rows), bool)), jnp.arange(num_rows)[None, :])


def chunk_attention(
    q: jax.Array, cache: LayerCache, config: AttentionConfig, *, sink: int, local: int, kv_heads: Sequence[int]
) -> jax.Array:
    """`window_attention` of many tokens that follow each other: block by block, each with what its rows see.

    A token costs sink + local + `BLOCK` products, however long the text is.
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
