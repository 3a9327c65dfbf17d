"""Flash decoding: a few rows of queries against the long cache of each key/value head, in parts that can be merged.

Read `partials.py` for the arithmetic, `reference.py` for the meaning, then `tpu.py` and `gpu.py`.

With lists of pages only the listed pages are read (`pages.py`, `pages_tpu.py`, `listed_gpu.py`).

Axis letters: B batch, K key/value heads, R rows of queries (heads of a group times new tokens), S cache slots, Dh head
width, N = B*K, P splits; J lists of pages, K or a multiple of it, of at most X pages each.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from pallas_kernels.compat import Interpret
from pallas_kernels.dispatch import (
    check_below,
    check_integers,
    check_lengths,
    check_one_dtype,
    check_shape,
    choose_form,
    unserved_by_kernels,
)
from pallas_kernels.flash_decode.gpu import flash_decode_gpu
from pallas_kernels.flash_decode.list_heads import ListHeads as ListHeads
from pallas_kernels.flash_decode.listed_gpu import listed_partials_gpu
from pallas_kernels.flash_decode.pages import PAGE_SIZES, wanted_pages
from pallas_kernels.flash_decode.pages import slots_of_pages as slots_of_pages
from pallas_kernels.flash_decode.pages_tpu import flash_decode_pages_tpu
from pallas_kernels.flash_decode.partials import Partials as Partials
from pallas_kernels.flash_decode.partials import merge_partials as merge_partials
from pallas_kernels.flash_decode.partials import normalize as normalize
from pallas_kernels.flash_decode.reference import flash_decode_reference, listed_partials
from pallas_kernels.flash_decode.reference import gather_slots as gather_slots
from pallas_kernels.flash_decode.reference import masked_partials as masked_partials
from pallas_kernels.flash_decode.tpu import flash_decode_tpu

_KERNELS = {"tpu": flash_decode_tpu, "gpu": flash_decode_gpu}


def flash_decode(
    q_rows: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    first: jax.Array | None = None,
    pages: jax.Array | None = None,
    page_size: int | None = None,
    heads: Sequence[int] | None = None,
    splits: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    interpret: Interpret = False,
) -> Partials:
    """Returns attention over the live slots of a cache as a part, to be merged with others or normalized.

    Row r of batch row b sees the slots first[b, r] to lengths[b] - 1, in every key/value head; with `pages` those of
    them that stand in listed pages, and only listed pages are read.

    Args:
        q_rows: [B, K, R, Dh]: all rows that read key/value head k, rotated.
        k: [B, K, S, Dh] keys.
        v: [B, K, S, Dh] values; dead slots must be finite.
        lengths: i32[B], 0 to S, the live slots of each batch row.
        first: i32[B, R], the first slot that each row sees: its position - window + 1 for a sliding window, where a
            negative number means 0. None shows all live slots.
        pages: i32[B, J, X], numbers of pages; page i is the slots from i * page_size on. A negative number, or a page
            without live slots, stands for none; no page may stand in a list twice. J is K, or a multiple of it: then
            each key/value head has several lists, which serve equal runs of its R rows. (With R = G*T rows in the order
            (g, t), J = K*G gives each query head a list.) None reads all live slots.
        page_size: slots of a page, with `pages` alone; kernels take 16, 32, 64 and 128.
        heads: the heads of k and v that are read, in this order, with `pages` alone: everywhere else K is then their
            number. None for all.
        splits: into how many parts a kernel cuts the slots, which it computes side by side; changes no result. None
            leaves it to the kernel.
        scale: factor of the scores; None for Dh ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None for no cap.
        impl: "xla", "pallas", or "auto" for what was measured to be faster here.
        interpret: run the kernel without its device, slowly, for tests; needs impl="pallas".

    Returns:
        Partials with o f32[B, K, R, Dh], not divided by l; m and l f32[B, K, R].

    Raises:
        ValueError: shapes or dtypes that do not fit, lengths or pages beyond the cache, splits below 1, an `impl` that
            is unknown or has no kernel for these operands.
    """
    (batch, num_heads, num_rows, head_dim), num_slots = _check(q_rows, k, v, lengths, first, splits, heads)
    options = {"scale": head_dim**-0.5 if scale is None else scale, "softcap": softcap}
    if pages is not None or page_size is not None or heads is not None:
        _check_pages(q_rows, num_slots, pages, page_size)
        read = list_heads(heads, pages.shape[1], q_rows, k)
        part = _over_pages(q_rows, k, v, lengths, first, pages, page_size, read, splits, impl, interpret, options)
        return jax.tree.map(lambda x: x.reshape(batch, num_heads, num_rows, *x.shape[2:]), part)
    form = choose_form("flash_decode", impl, interpret, num_slots, unserved_by_kernels(k.dtype, head_dim, num_slots))
    q, k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (q_rows, k, v))
    lengths = jnp.repeat(lengths, num_heads)
    if first is not None:
        first = jnp.repeat(jnp.maximum(first, 0), num_heads, axis=0)
    if form == "xla":
        part = flash_decode_reference(q, k, v, lengths, first, **options)
    else:
        first = jnp.zeros((batch * num_heads, num_rows), jnp.int32) if first is None else first
        part = merge_partials(_KERNELS[form](q, k, v, lengths, first, splits=splits, interpret=interpret, **options))
    return jax.tree.map(lambda x: x.reshape(batch, num_heads, *x.shape[1:]), part)


def _over_pages(q_rows, k, v, lengths, first, pages, page_size, heads, splits, impl, interpret, options) -> Partials:
    """Returns the part of listed pages, o f32[N, R, Dh] with N = B*J lists and the R rows of each."""
    (batch, num_heads, num_rows, head_dim), lists, num_pages = q_rows.shape, heads.each, pages.shape[2]
    unserved = unserved_by_kernels(k.dtype, head_dim, k.shape[2])
    if page_size not in PAGE_SIZES:
        unserved = f"pages of {page_size} slots (it must be one of {', '.join(map(str, PAGE_SIZES))})"
    form = choose_form("flash_decode_pages", impl, interpret, num_pages * page_size, unserved)
    q = rearrange(q_rows, "b k (j r) d -> (b k j) r d", j=lists)
    k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (k, v))
    lengths, pages = jnp.repeat(lengths, num_heads * lists), rearrange(pages, "b j x -> (b j) x")
    starts = jnp.zeros((batch, num_rows), jnp.int32) if first is None else jnp.maximum(first, 0)
    starts = repeat(starts, "b (j r) -> (b k j) r", k=num_heads, j=lists)
    if form == "xla":
        slots = slots_of_pages(pages, lengths, page_size)
        visible = slots[:, None, :] >= (0 if first is None else starts[:, :, None])
        return listed_partials(q, k, v, slots, heads.table(batch), visible, **options)
    options = options | {"splits": splits, "interpret": interpret}
    pages, counts = wanted_pages(pages, lengths, starts, page_size)
    if form == "tpu":
        part = flash_decode_pages_tpu(q, k, v, pages, counts, lengths, starts, heads, page_size=page_size, **options)
    else:
        pages = jnp.where(jnp.arange(num_pages, dtype=jnp.int32)[None, :] < counts[:, None], pages, -1)
        slots = slots_of_pages(pages, lengths, page_size)
        part = listed_partials_gpu(q, k, v, slots, counts * page_size, starts, heads, **options)
    return merge_partials(part)


def list_heads(heads: Sequence[int] | None, lists: int, q_rows: jax.Array, k: jax.Array) -> ListHeads:
    """Returns which heads of k [B, K, S, Dh] a batch row's `lists` lists read: `heads`, None for all.

    Raises:
        ValueError: heads that k does not have, or not as many as q_rows has.
    """
    read = tuple(range(k.shape[1])) if heads is None else tuple(int(head) for head in heads)
    if len(read) != q_rows.shape[1] or not set(read) <= set(range(k.shape[1])):
        raise ValueError(
            f"heads is {list(read)}; it must name one of the {k.shape[1]} heads of k for each of the {q_rows.shape[1]} "
            f"of q_rows."
        )
    return ListHeads(lists // len(read), read, k.shape[1])


def _check_pages(q_rows, num_slots, pages, page_size) -> None:
    """Raises ValueError on lists of pages that do not fit the other arguments."""
    heads = q_rows.shape[1]
    if pages is None or page_size is None:
        raise ValueError(
            f"page_size is {page_size} and pages is {'None' if pages is None else 'given'}: pass both, or neither of "
            f"them nor heads."
        )
    if page_size < 1:
        raise ValueError(f"page_size is {page_size}; it must be at least 1.")
    if pages.ndim != 3 or pages.shape[0] != len(q_rows) or not pages.shape[2]:
        raise ValueError(f"pages has the shape {pages.shape}; it must be [B, J, X] with B {len(q_rows)} and X above 0.")
    if not pages.shape[1] or pages.shape[1] % heads or q_rows.shape[2] % (pages.shape[1] // heads):
        raise ValueError(
            f"pages has {pages.shape[1]} lists; there must be K ({heads}) of them, or as many times K as divides the "
            f"{q_rows.shape[2]} rows of a key/value head."
        )
    check_integers("pages", pages)
    check_below("pages", pages, -(-num_slots // page_size), "pages")


def _check(q_rows, k, v, lengths, first, splits, heads) -> tuple[tuple[int, int, int, int], int]:
    """Returns (B, K, R, Dh), S, or raises ValueError."""
    for name, value in {"q_rows": q_rows, "k": k}.items():
        if value.ndim != 4:
            raise ValueError(f"{name} has the shape {value.shape}; it must have the four axes of [B, K, rows, Dh].")
    batch, num_heads, num_rows, head_dim = q_rows.shape
    num_slots = k.shape[2]
    check_shape("k", k, (batch, num_heads if heads is None else k.shape[1], num_slots, head_dim), "B, K, S, Dh")
    check_shape("v", v, k.shape, "B, K, S, Dh")
    check_shape("lengths", lengths, (batch,), "B")
    check_integers("lengths", lengths)
    check_one_dtype(q_rows=q_rows, k=k, v=v)
    check_lengths(lengths, num_slots)
    if first is not None:
        check_shape("first", first, (batch, num_rows), "B, R")
        check_integers("first", first)
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}; it must be at least 1, or None.")
    return (batch, num_heads, num_rows, head_dim), num_slots
