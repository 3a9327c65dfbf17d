"""Flash decoding for GPUs, through the Triton backend of Pallas.

The grid is (N, row blocks, splits): each program walks over the live blocks of its split's slots. A step of decoding
has few rows and many slots, so it is the splits that keep the processors busy; a split that holds no live slot ends at
once. Every array in a kernel of this backend has a size that is a power of two.

Axis letters: N batch rows times key/value heads, R rows of queries, S slots, P splits, Dh head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.flash_decode.partials import HIDDEN, Partials, absorb_block

SLOTS = 64  # slots of a block
LEAST_ROWS = 16  # the smallest side of a product on a tensor core
LEAST_SPLIT = 128  # slots
PROGRAMS = 256  # about two for each processor of a large GPU


def flash_decode_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    *,
    splits: int | None,
    scale: float,
    softcap: float | None,
    interpret: compat.Interpret = False,
) -> Partials:
    """Returns the parts of the splits, P along the first axis.

    Args:
        q: [N, R, Dh], Dh a power of two.
        k: [N, S, Dh].
        v: [N, S, Dh].
        lengths: i32[N], 0 to S; slots from here on are dead and may hold anything.
        first: i32[N, R], not negative: the first slot that each row sees.
        splits: P; None for as many as make `PROGRAMS` programs, of at least `LEAST_SPLIT` slots each.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
        interpret: as `pallas_call` takes it.
    """
    (num, num_rows, head_dim), num_slots = q.shape, k.shape[1]
    rows, row_blocks = blocks_of_rows(num_rows, head_dim)
    splits, size = cut(num_slots, num * row_blocks, splits)
    padding = ((0, 0), (0, row_blocks * rows - num_rows))

    def part(*last):
        return jax.ShapeDtypeStruct((splits, num, row_blocks * rows, *last), jnp.float32)

    o, m, l = pl.pallas_call(  # noqa: E741
        partial(_kernel, size=size, scale=scale, softcap=softcap),
        grid=(num, row_blocks, splits),
        in_specs=[
            pl.BlockSpec((None,), lambda n, r, p: (n,)),
            pl.BlockSpec((None,), lambda n, r, p: (n,)),
            pl.BlockSpec((None, rows), lambda n, r, p: (n, r)),
            pl.BlockSpec((None, rows, head_dim), lambda n, r, p: (n, r, 0)),
            pl.BlockSpec((None, num_slots, head_dim), lambda n, r, p: (n, 0, 0)),
            pl.BlockSpec((None, num_slots, head_dim), lambda n, r, p: (n, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, rows, head_dim), lambda n, r, p: (p, n, r, 0)),
            pl.BlockSpec((None, None, rows), lambda n, r, p: (p, n, r)),
            pl.BlockSpec((None, None, rows), lambda n, r, p: (p, n, r)),
        ],
        out_shape=[part(head_dim), part(), part()],
        compiler_params=compat.gpu_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="flash_decode",
    )(jnp.min(first, axis=1), lengths, jnp.pad(first, padding), jnp.pad(q, (*padding, (0, 0))), k, v)
    return Partials(o[:, :, :num_rows], m[:, :, :num_rows], l[:, :, :num_rows])


def blocks_of_rows(num_rows: int, head_dim: int) -> tuple[int, int]:
    """Returns how many rows a program holds, a power of two, and how many such blocks there are."""
    rows = min(max(LEAST_ROWS, pl.next_power_of_2(num_rows)), 64 if head_dim <= 128 else 32)
    return rows, pl.cdiv(num_rows, rows)


def cut(num_slots: int, programs: int, splits: int | None) -> tuple[int, int]:
    """Returns (splits, slots of each, whole blocks): as asked, or such that the programs of all splits fill a GPU.

    Args:
        num_slots: slots to be cut.
        programs: of one split.
        splits: at most how many; None to choose.
    """
    if splits is None:
        splits = max(1, min(PROGRAMS // programs, num_slots // LEAST_SPLIT))
    blocks = pl.cdiv(num_slots, SLOTS)
    size = pl.cdiv(blocks, min(splits, blocks)) * SLOTS
    return pl.cdiv(num_slots, size), size


def nothing_seen(shape: tuple[int, int]) -> Partials:
    """Returns the part, of shape [R, Dh], of rows that saw nothing: o [R, Dh], m and l [R, 1]."""
    column = (shape[0], 1)
    return Partials(jnp.zeros(shape, jnp.float32), jnp.full(column, HIDDEN), jnp.zeros(column, jnp.float32))


def _kernel(start_ref, length_ref, first_ref, q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, *, size, scale, softcap):
    """One split of `size` slots for one block of rows: first [R], q [R, Dh], k, v [S, Dh]; o [R, Dh], m, l [R]."""
    num_slots = k_ref.shape[0]
    split, length = pl.program_id(2), length_ref[...]
    begin = jnp.maximum(split * size, start_ref[...])
    end = jnp.minimum((split + 1) * size, length)
    q, first = q_ref[...], first_ref[...][:, None]

    def absorb(block, part):
        slots = block * SLOTS + lax.iota(jnp.int32, SLOTS)
        there = jnp.minimum(slots, num_slots - 1)  # the last block may reach beyond the cache
        visible = (slots < length)[None, :] & (slots[None, :] >= first)
        # A dead value may be NaN, which no weight of 0 removes.
        v = jnp.where((slots < length)[:, None], v_ref[there, :], jnp.zeros((), v_ref.dtype))
        return absorb_block(part, q, k_ref[there, :], v, visible, scale=scale, softcap=softcap)

    part = lax.fori_loop(lax.div(begin, SLOTS), lax.div(end + (SLOTS - 1), SLOTS), absorb, nothing_seen(q.shape))
    o_ref[...], m_ref[...], l_ref[...] = part.o, part.m[:, 0], part.l[:, 0]
