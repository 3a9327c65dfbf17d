"""Pages of the cache: what is kept about their keys, and which of them a query wants.

A page of `page` tokens has `page // logical` logical pages; of each the highest and lowest key is kept, channel by
channel. For a query q and a logical page j

    score_j = sum_d max(q_d kmax_jd, q_d kmin_jd) = relu(q) . kmax_j + min(q, 0) . kmin_j  >=  q . k for all its keys k

and a page's score is that of its best logical page (LServe, 2502.14866, section 3.5; with pages of one logical page:
Quest, 2406.10774).

Axis letters: B batch, S cache slots, K key/value heads here, G query heads of each, J sets of pages (K or K*G), M pages
of the cache, L logical pages of the cache, N pages chosen, Dh head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.sparse.selected import gather_slots
from models.kernels import PRECISION


@struct.dataclass
class PageBounds:
    """The highest and lowest key of each logical page: high, low f32 or the cache's dtype [B, K, L, Dh].

    They are right for pages whose slots are all committed; those of others must not be used.
    """

    high: jax.Array
    low: jax.Array


def page_bounds(keys: jax.Array, logical: int) -> PageBounds:
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
    high, low = (page_bounds(jnp.where(live, keys, edge), logical) for edge in (-most, most))
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
    slots = (last[:, None] * page + jnp.arange(page)[None, :])[:, None, None, :]
    slots = jnp.broadcast_to(slots, (len(start), 1, len(kv_heads), page))
    num_logical = page // _logical(bounds, keys.shape[2], page)
    new = page_bounds(gather_slots(keys, kv_heads, slots)[:, 0], page // num_logical)
    place = jax.vmap(lambda all_, new, at: jax.lax.dynamic_update_slice(all_, new, (0, at, 0)))
    at = last * num_logical
    return PageBounds(place(bounds.high, new.high, at), place(bounds.low, new.low, at))


def _logical(bounds: PageBounds, num_slots: int, page: int) -> int:
    """Returns the tokens of a logical page."""
    return -(-num_slots // page) * page // bounds.high.shape[2]


def page_scores(q: jax.Array, bounds: PageBounds, num_pages: int) -> jax.Array:
    """Returns f32[B, K, G, M]: the best bound of q . k in each page, for q [B, K, G, Dh]."""

    def product(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.einsum("bkgd,bkld->bkgl", one, other, precision=PRECISION, preferred_element_type=jnp.float32)

    scores = product(jnp.maximum(q, 0), bounds.high) + product(jnp.minimum(q, 0), bounds.low)
    return scores.reshape(*scores.shape[:3], num_pages, -1).max(axis=4)


def chosen_pages(scores: jax.Array, newest: jax.Array, count: int) -> jax.Array:
    """Returns i32[B, J, N]: the best count - 1 of the pages before the newest, and the newest; -1 where there is none.

    Args:
        scores: f32[B, J, M].
        newest: i32[B], the page that the newest token stands in. All pages before it are full.
        count: N.
    """
    num_pages = scores.shape[2]
    full = jnp.arange(num_pages)[None, None, :] < newest[:, None, None]
    best, pages = jax.lax.top_k(jnp.where(full, scores, -jnp.inf), min(count - 1, num_pages))
    pages = jnp.where(best > -jnp.inf, pages, -1)
    return jnp.concatenate([pages, jnp.broadcast_to(newest[:, None, None], (*pages.shape[:2], 1))], axis=2)


def page_slots(pages: jax.Array, page: int, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the slots of pages i32[B, J, N] and which of them are committed: i32 and bool[B, 1, J, N * page]."""
    slots = pages[..., None] * page + jnp.arange(page)[None, None, None, :]
    slots = slots.reshape(*pages.shape[:2], -1)[:, None]
    return slots, (slots >= 0) & (slots < start[:, None, None, None])
