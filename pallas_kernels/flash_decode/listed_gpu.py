"""Flash decoding over listed slots for GPUs, through the Triton backend of Pallas.

As in `gpu.py`, but a block's rows of keys and values are gathered by the list. A page is `page_size` entries of it, so
that its rows lie side by side in memory.

Axis letters: N lists, M batch rows times key/value heads, R rows of queries, S slots, X slots of a list, Dh head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.flash_decode.gpu import SLOTS, blocks_of_rows, cut, nothing_seen
from pallas_kernels.flash_decode.list_heads import ListHeads
from pallas_kernels.flash_decode.partials import Partials, absorb_block


def listed_partials_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    counts: jax.Array,
    first: jax.Array,
    heads: ListHeads,
    *,
    splits: int | None,
    scale: float,
    softcap: float | None,
    interpret: compat.Interpret = False,
) -> Partials:
    """Returns the parts of the splits along the first axis.

    Args:
        q: [N, R, Dh], Dh a power of two.
        k: [M, S, Dh].
        v: [M, S, Dh].
        slots: i32[N, X], below S; a negative one stands for none.
        counts: i32[N], 0 to X; from there on a list holds no slot.
        first: i32[N, R], not negative: the first slot that each row sees.
        heads: which of the M heads each list reads.
        splits: parts of a list that are computed side by side; None for as many as fill a GPU.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
        interpret: as `pallas_call` takes it.
    """
    (num, num_rows, head_dim), num_slots = q.shape, k.shape[1]
    rows, row_blocks = blocks_of_rows(num_rows, head_dim)
    splits, size = cut(slots.shape[1], num * row_blocks, splits)
    padding = ((0, 0), (0, row_blocks * rows - num_rows))
    slots = jnp.pad(slots, ((0, 0), (0, splits * size - slots.shape[1])), constant_values=-1)

    def part(*last):
        return jax.ShapeDtypeStruct((splits, num, row_blocks * rows, *last), jnp.float32)

    of_head = pl.BlockSpec((None, num_slots, head_dim), lambda n, r, p: (heads.entry(n), 0, 0))
    o, m, l = pl.pallas_call(  # noqa: E741
        partial(_kernel, scale=scale, softcap=softcap),
        grid=(num, row_blocks, splits),
        in_specs=[
            pl.BlockSpec((None,), lambda n, r, p: (n,)),
            pl.BlockSpec((None, size), lambda n, r, p: (n, p)),
            pl.BlockSpec((None, rows), lambda n, r, p: (n, r)),
            pl.BlockSpec((None, rows, head_dim), lambda n, r, p: (n, r, 0)),
            of_head,
            of_head,
        ],
        out_specs=[
            pl.BlockSpec((None, None, rows, head_dim), lambda n, r, p: (p, n, r, 0)),
            pl.BlockSpec((None, None, rows), lambda n, r, p: (p, n, r)),
            pl.BlockSpec((None, None, rows), lambda n, r, p: (p, n, r)),
        ],
        out_shape=[part(head_dim), part(), part()],
        compiler_params=compat.gpu_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="listed_partials",
    )(counts, slots, jnp.pad(first, padding), jnp.pad(q, (*padding, (0, 0))), k, v)
    return Partials(o[:, :, :num_rows], m[:, :, :num_rows], l[:, :, :num_rows])


def _kernel(count_ref, slots_ref, first_ref, q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, *, scale, softcap):
    """One split's slots [C] of a list, one block of rows: first [R], q [R, Dh], k, v [S, Dh]; o [R, Dh], m, l [R]."""
    size = slots_ref.shape[0]
    mine = jnp.clip(count_ref[...] - pl.program_id(2) * size, 0, size)
    q, first = q_ref[...], first_ref[...][:, None]

    def absorb(block, part):
        slots = slots_ref[pl.ds(block * SLOTS, SLOTS)]
        there = jnp.maximum(slots, 0)
        # What stands in the place of no slot may be NaN, which no weight of 0 removes.
        v = jnp.where((slots >= 0)[:, None], v_ref[there, :], jnp.zeros((), v_ref.dtype))
        return absorb_block(part, q, k_ref[there, :], v, slots[None, :] >= first, scale=scale, softcap=softcap)

    part = lax.fori_loop(0, lax.div(mine + (SLOTS - 1), SLOTS), absorb, nothing_seen(q.shape))
    o_ref[...], m_ref[...], l_ref[...] = part.o, part.m[:, 0], part.l[:, 0]
