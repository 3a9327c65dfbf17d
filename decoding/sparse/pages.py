"""Pages of the cache: what is kept about their keys while a text grows, and the slots of those that a query wants.

Scores of pages and the choice among them are `pallas_kernels.page_select`, where the formula stands. The bounds here
are brought up to date step by step, and are right for pages whose slots are all committed; those of others must not be
used.

Axis letters: B batch, S cache slots, K key/value heads here, J sets of pages, L logical pages of the cache, N pages
chosen, Dh head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from decoding.sparse.selected import taken_slots
from pallas_kernels.page_select import PageBounds


def bounds_of(keys: jax.Array, logical: int) -> PageBounds:
    """Returns the bounds of keys [B, K, S, Dh], S a multiple of `logical`."""
    batch, heads, slots, width = keys.shape
    keys = keys.reshape(batch, heads, slots // logical, logical, width)
    return PageBounds(keys.max(axis=3), keys.min(axis=3))


def all_bounds(keys: jax.Array, kv_heads: np.ndarray, page: int, logical: int, length: jax.Array) -> PageBounds:
    """Returns the bounds of some heads of a layer's keys [B, K, S, Dh], of which i32[B] `length` are committed.

    A page that S cuts short counts as one. Where no key of a logical page is committed, the highest is the lowest
    number there is, and the other way round: any key is a better bound.
    """
    spare, most = -keys.shape[2] % page, jnp.finfo(keys.dtype).max
    keys = jnp.pad(keys[:, kv_heads], ((0, 0), (0, 0), (0, spare), (0, 0)))
    live = (jnp.arange(keys.shape[2])[None, :] < length[:, None])[:, None, :, None]
    high, low = (bounds_of(jnp.where(live, keys, edge), logical) for edge in (-most, most))
    return PageBounds(high.high, low.low)


def extended(bounds: PageBounds, keys: jax.Array, start: jax.Array, logical: int) -> PageBounds:
    """Returns the bounds with one more key for each row.

    Args:
        bounds: of the tokens before it.
        keys: [B, K, Dh], the heads that have bounds.
        start: i32[B], the slot that it takes.
        logical: tokens of a logical page.
    """
    page, row = start // logical, jnp.arange(len(start))
    keys = keys.astype(bounds.high.dtype)
    return PageBounds(bounds.high.at[row, :, page].max(keys), bounds.low.at[row, :, page].min(keys))


def renewed(bounds: PageBounds, keys: jax.Array, kv_heads: np.ndarray, start: jax.Array, page: int) -> PageBounds:
    """Returns the bounds with those of the last full page computed again from its keys.

    Called before each step that commits at most `page` tokens, it keeps the bounds of all full pages right, whatever
    stood in their slots before.

    Args:
        bounds: of all pages.
        keys: [B, K, S, Dh] of the layer.
        kv_heads: i[K here], the heads that have bounds.
        start: i32[B], committed tokens.
        page: tokens of a page.
    """
    last = jnp.maximum(start // page - 1, 0)
    slots = (last[:, None] * page + jnp.arange(page)[None, :])[:, None, :]
    slots = jnp.broadcast_to(slots, (len(start), len(kv_heads), page))
    num_logical = page // _logical(bounds, keys.shape[2], page)
    new = bounds_of(taken_slots(keys, slots, kv_heads), page // num_logical)
    place = jax.vmap(lambda all_, new, at: jax.lax.dynamic_update_slice(all_, new, (0, at, 0)))
    at = last * num_logical
    return PageBounds(place(bounds.high, new.high, at), place(bounds.low, new.low, at))


def _logical(bounds: PageBounds, num_slots: int, page: int) -> int:
    """Returns the tokens of a logical page."""
    return -(-num_slots // page) * page // bounds.high.shape[2]
