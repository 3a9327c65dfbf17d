"""Which pages of a cache a query wants, by the highest and the lowest key of each page.

A page of `page_size` slots has g = page_size // logical_size logical pages. Of a logical page the highest and the
lowest live key are kept, channel by channel; for a query q they bound its products with all keys k of that page,

    score = sum_d max(q_d high_d, q_d low_d) = relu(q) . high + min(q, 0) . low  >=  q . k

and a page's score is that of its best logical page. The order of use is `page_bounds`, `page_scores`, `chosen_pages`,
`flash_decode(pages=...)`. What has a form per platform is `page_scores`, which reads all bounds; the bounds and the
choice are a reduction and a sort, which XLA has.

Source: "LServe" (2502.14866), section 3.5; with one logical page to a page, "Quest" (2406.10774).

Axis letters: B batch, K key/value heads, R rows of queries, S cache slots, L logical pages, M = L/g pages, Dh head
width, J sets of pages, N = B*K.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.compat import Interpret
from pallas_kernels.dispatch import (
    check_integers,
    check_lengths,
    check_one_dtype,
    check_shape,
    choose_form,
    unserved_by_kernels,
)
from pallas_kernels.page_select.gpu import page_scores_gpu
from pallas_kernels.page_select.reference import page_scores_reference
from pallas_kernels.page_select.tpu import page_scores_tpu

MOST_LOGICAL = 8  # logical pages of a page that kernels take
_FORMS = {"xla": page_scores_reference, "tpu": page_scores_tpu, "gpu": page_scores_gpu}


class PageBounds(NamedTuple):
    """Channelwise bounds of the keys of each logical page; those of one without live slots are not looked at.

    Attributes:
        high: [B, K, L, Dh] in the cache's dtype.
        low: the same.
    """

    high: jax.Array
    low: jax.Array


def page_bounds(k: jax.Array, lengths: jax.Array, *, page_size: int, logical_size: int) -> PageBounds:
    """Returns the bounds of a cache's live keys, L covering the slots in whole pages.

    Args:
        k: [B, K, S, Dh] keys, rotated; dead ones may hold anything.
        lengths: i32[B], 0 to S, the live slots.
        page_size: slots of a page.
        logical_size: slots of a logical page; divides `page_size`.

    Raises:
        ValueError: shapes that do not fit, lengths beyond the cache, a logical size that does not divide the page's.
    """
    if k.ndim != 4:
        raise ValueError(f"k has the shape {k.shape}; it must have the four axes of [B, K, S, Dh].")
    _check_sizes(page_size, logical_size)
    _check_lengths(lengths, len(k), k.shape[2])
    padded = jnp.pad(k, ((0, 0), (0, 0), (0, -k.shape[2] % page_size), (0, 0)))
    live = jnp.arange(padded.shape[2], dtype=jnp.int32)[None, :] < lengths[:, None]
    live = rearrange(live, "b (l s) -> b 1 l s 1", s=logical_size)
    keys = rearrange(padded, "b k (l s) d -> b k l s d", s=logical_size)
    most = jnp.asarray(jnp.finfo(k.dtype).max, k.dtype)
    some = live.any(axis=3)
    high = jnp.where(some, jnp.where(live, keys, -most).max(axis=3), jnp.zeros((), k.dtype))
    low = jnp.where(some, jnp.where(live, keys, most).min(axis=3), jnp.zeros((), k.dtype))
    return PageBounds(high, low)


def page_scores(
    q_rows: jax.Array,
    bounds: PageBounds,
    lengths: jax.Array,
    *,
    page_size: int,
    logical_size: int,
    impl: str = "auto",
    interpret: Interpret = False,
) -> jax.Array:
    """Returns the score of each page for each row, f32[B, K, R, M]: very low (`HIDDEN`) for a page without live slots.

    Args:
        q_rows: [B, K, R, Dh]: rows that read key/value head k, rotated; not scaled.
        bounds: of all pages, [B, K, L, Dh] each.
        lengths: i32[B]; bounds of logical pages that begin here or later are not looked at.
        page_size: slots of a page.
        logical_size: slots of a logical page; divides `page_size`.
        impl: "xla", "pallas", or "auto" for what was measured to be faster here.
        interpret: run the kernel without its device, slowly, for tests; needs impl="pallas".

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit, lengths beyond the pages, an `impl` that is unknown or has
            no kernel for these operands.
    """
    _check_sizes(page_size, logical_size)
    logical = page_size // logical_size
    for name, value in {"q_rows": q_rows, "bounds.high": bounds.high}.items():
        if value.ndim != 4:
            raise ValueError(f"{name} has the shape {value.shape}; it must have four axes.")
    (batch, heads, _, head_dim), count = q_rows.shape, bounds.high.shape[2]
    check_shape("bounds.high", bounds.high, (batch, heads, count, head_dim), "B, K, L, Dh")
    check_shape("bounds.low", bounds.low, bounds.high.shape, "B, K, L, Dh")
    check_one_dtype(q_rows=q_rows, high=bounds.high, low=bounds.low)
    if count % logical:
        raise ValueError(
            f"there are {count} logical pages; with {logical} to a page (page_size {page_size} over logical_size "
            f"{logical_size}) their number must be a multiple of {logical}."
        )
    _check_lengths(lengths, batch, count * logical_size)
    unserved = unserved_by_kernels(q_rows.dtype, head_dim, count * logical_size)
    if logical > MOST_LOGICAL:
        unserved = f"{logical} logical pages to a page (at most {MOST_LOGICAL})"
    form = choose_form("page_scores", impl, interpret, count * logical_size, unserved)
    q = rearrange(q_rows, "b k r d -> (b k) r d")
    high, low = (rearrange(x, "b k (m g) d -> (b k) m g d", g=logical) for x in bounds)
    options = {} if form == "xla" else {"interpret": interpret}
    scores = _FORMS[form](q, high, low, jnp.repeat(lengths, heads), logical_size=logical_size, **options)
    return rearrange(scores, "(b k) r m -> b k r m", b=batch)


def chosen_pages(scores: jax.Array, lengths: jax.Array, count: int, *, page_size: int) -> jax.Array:
    """Returns the best pages before the newest, and the newest: i32[B, J, min(count, M)], -1 in place of none.

    Args:
        scores: f32[B, J, M]; to let rows share pages, the highest of their scores.
        lengths: i32[B], live slots; the newest page is the one of the last of them.
        count: pages to choose, the newest included, at least 1.
        page_size: slots of a page.

    Raises:
        ValueError: a count or page size below 1, shapes that do not fit, lengths beyond the pages.
    """
    if count < 1 or page_size < 1:
        raise ValueError(f"count is {count} and page_size {page_size}; both must be at least 1.")
    if scores.ndim != 3:
        raise ValueError(f"scores has the shape {scores.shape}; it must have the three axes of [B, J, M].")
    (batch, sets, num_pages) = scores.shape
    _check_lengths(lengths, batch, num_pages * page_size)
    newest = (lengths + (page_size - 1)) // page_size - 1
    older = jnp.arange(num_pages, dtype=jnp.int32)[None, None, :] < newest[:, None, None]
    best, pages = jax.lax.top_k(jnp.where(older, scores, -jnp.inf), min(count, num_pages) - 1)
    pages = jnp.where(best > -jnp.inf, pages, -1)
    return jnp.concatenate([pages, jnp.broadcast_to(newest[:, None, None], (batch, sets, 1))], axis=2)


def _check_sizes(page_size: int, logical_size: int) -> None:
    """Raises ValueError unless logical pages fill a page."""
    if page_size < 1 or logical_size < 1 or page_size % logical_size:
        raise ValueError(f"logical_size is {logical_size} and page_size {page_size}; the first must divide the second.")


def _check_lengths(lengths: jax.Array, batch: int, num_slots: int) -> None:
    """Raises ValueError unless lengths is i32[B] from 0 to `num_slots`."""
    check_shape("lengths", lengths, (batch,), "B")
    check_integers("lengths", lengths)
    check_lengths(lengths, num_slots)
