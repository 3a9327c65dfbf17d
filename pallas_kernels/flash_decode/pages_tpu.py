"""Flash decoding over listed pages for TPUs.

The grid is (N, row blocks, splits, groups of pages). The lists are known before the kernel starts, so each step's index
maps name the pages to fetch; a step takes several pages, each an operand of its own, as a transfer of one page is too
short to hide the next one's delay. Steps behind the end of a list fetch and compute nothing.

Axis letters: N lists, M batch rows times key/value heads, R rows of queries, S slots, P pages of a list, Dh head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.flash_decode.list_heads import ListHeads
from pallas_kernels.flash_decode.partials import Partials
from pallas_kernels.flash_decode.tpu import absorb_slots, blocks_of_rows, see_nothing

TOGETHER = 8  # most pages of a step


def flash_decode_pages_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    heads: ListHeads,
    *,
    page_size: int,
    splits: int | None,
    scale: float,
    softcap: float | None,
    interpret: compat.Interpret = False,
) -> Partials:
    """Returns the parts of the splits along the first axis.

    Args:
        q: [N, R, Dh].
        k: [M, S, Dh].
        v: [M, S, Dh].
        pages: i32[N, P], valid pages; all lists together must fit the chip's scalar memory.
        counts: i32[N], how many pages of each list count.
        lengths: i32[N], 0 to S; slots from here on are dead and may hold anything.
        first: i32[N, R], not negative: the first slot that each row sees.
        heads: which of the M heads each list reads.
        page_size: slots of a page, a multiple of 16.
        splits: parts of a list that may be computed side by side; None for 1.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
        interpret: as `pallas_call` takes it.
    """
    (num, num_rows, head_dim), num_pages = q.shape, pages.shape[1]
    rows, row_blocks = blocks_of_rows(num_rows, q.dtype)
    together = min(TOGETHER, num_pages)
    groups = pl.cdiv(num_pages, together)
    splits = min(splits or 1, groups)
    steps = pl.cdiv(groups, splits)
    padding = ((0, 0), (0, row_blocks * rows - num_rows))

    def at_rows(n, r, p, j, pages, counts, lengths):
        return n, r, 0

    def at_page(i, n, r, p, j, pages, counts, lengths):
        last = jnp.maximum(counts[n] - 1, 0)
        return heads.entry(n), pages[n, jnp.minimum((p * steps + j) * together + i, last)], 0

    def at_part(n, r, p, j, pages, counts, lengths):
        return p, n, r, 0

    def part(width):
        return jax.ShapeDtypeStruct((splits, num, row_blocks * rows, width), jnp.float32)

    of_pages = [pl.BlockSpec((None, page_size, head_dim), partial(at_page, i)) for i in range(together)]
    o, m, l = pl.pallas_call(  # noqa: E741
        partial(_kernel, steps=steps, together=together, scale=scale, softcap=softcap),
        grid_spec=compat.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num, row_blocks, splits, steps),
            in_specs=[
                pl.BlockSpec((None, rows, 1), at_rows),
                pl.BlockSpec((None, rows, head_dim), at_rows),
                *of_pages,
                *of_pages,
            ],
            out_specs=[pl.BlockSpec((None, None, rows, width), at_part) for width in (head_dim, 1, 1)],
        ),
        out_shape=[part(head_dim), part(1), part(1)],
        compiler_params=compat.tpu_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="flash_decode_pages",
    )(
        *(pages, counts, lengths, jnp.pad(first, padding)[..., None], jnp.pad(q, (*padding, (0, 0)))),
        *([k] * together + [v] * together),
    )
    return Partials(o[:, :, :num_rows], m[:, :, :num_rows, 0], l[:, :, :num_rows, 0])


def _kernel(pages_ref, counts_ref, lengths_ref, first_ref, q_ref, *refs, steps, together, scale, softcap):
    """Some pages for one block of rows.

    Blocks: first [R, 1], q [R, Dh], then `together` of keys and as many of values [page_size, Dh]; o [R, Dh], m and l
    [R, 1].
    """
    row, step = pl.program_id(0), pl.program_id(3)
    begin = (pl.program_id(2) * steps + step) * together
    part_refs = refs[2 * together :]

    @pl.when(step == 0)
    def _empty():
        see_nothing(*part_refs)

    def absorb(at, k_ref, v_ref):
        @pl.when(at < counts_ref[row])
        def _absorb():
            slot = pages_ref[row, at] * k_ref.shape[0]
            operands = slot, lengths_ref[row], first_ref, q_ref, k_ref, v_ref, part_refs
            absorb_slots(*operands, scale=scale, softcap=softcap)

    for i in range(together):
        absorb(begin + i, refs[i], refs[together + i])
