"""Flash decoding for TPUs.

The grid is (N, row blocks, splits, slot blocks). The last axis runs in order: the output blocks stay in fast memory and
take up one block of slots after another. Slot blocks that no row sees are neither fetched (their index is clamped to
the nearest live block, and a block that is already there is not fetched again) nor computed.

Axis letters: N batch rows times key/value heads, R rows of queries, S slots, P splits, Dh head width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.flash_decode.partials import HIDDEN, Partials, absorb_block

SLOTS = 512  # most slots of a block
ROWS = 512  # most rows of a block
LANES = 128

Ref = Any  # a block in fast memory, as a kernel is given it


def flash_decode_tpu(
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
        q: [N, R, Dh].
        k: [N, S, Dh], S at least 128.
        v: [N, S, Dh].
        lengths: i32[N], 0 to S; slots from here on are dead and may hold anything.
        first: i32[N, R], not negative: the first slot that each row sees.
        splits: P, the parts that may be computed side by side; None for 1, which suits a chip with one core.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
        interpret: as `pallas_call` takes it.
    """
    (num, num_rows, head_dim), num_slots = q.shape, k.shape[1]
    rows, row_blocks = blocks_of_rows(num_rows, q.dtype)
    slots = min(SLOTS, num_slots // LANES * LANES)
    splits = min(splits or 1, pl.cdiv(num_slots, slots))
    steps = pl.cdiv(pl.cdiv(num_slots, slots), splits)
    padding = ((0, 0), (0, row_blocks * rows - num_rows))
    starts = jnp.min(first, axis=1)

    def at_rows(n, r, p, j, starts, lengths):
        return n, r, 0

    def at_slots(n, r, p, j, starts, lengths):
        low, high = lax.div(starts[n], slots), lax.div(jnp.maximum(lengths[n] - 1, 0), slots)
        return n, jnp.minimum(jnp.maximum(p * steps + j, low), high), 0

    def at_part(n, r, p, j, starts, lengths):
        return p, n, r, 0

    def part(width):
        return jax.ShapeDtypeStruct((splits, num, row_blocks * rows, width), jnp.float32)

    o, m, l = pl.pallas_call(  # noqa: E741
        partial(_kernel, steps=steps, scale=scale, softcap=softcap),
        grid_spec=compat.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(num, row_blocks, splits, steps),
            in_specs=[
                pl.BlockSpec((None, rows, 1), at_rows),
                pl.BlockSpec((None, rows, head_dim), at_rows),
                pl.BlockSpec((None, slots, head_dim), at_slots),
                pl.BlockSpec((None, slots, head_dim), at_slots),
            ],
            out_specs=[pl.BlockSpec((None, None, rows, width), at_part) for width in (head_dim, 1, 1)],
        ),
        out_shape=[part(head_dim), part(1), part(1)],
        compiler_params=compat.tpu_params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="flash_decode",
    )(starts, lengths, jnp.pad(first, padding)[..., None], jnp.pad(q, (*padding, (0, 0))), k, v)
    return Partials(o[:, :, :num_rows], m[:, :, :num_rows, 0], l[:, :, :num_rows, 0])


def blocks_of_rows(num_rows: int, dtype: jnp.dtype) -> tuple[int, int]:
    """Returns how many rows a step holds, whole tiles of the dtype, and how many such blocks there are."""
    tile = 8 if dtype == jnp.float32 else 16
    row_blocks = pl.cdiv(num_rows, ROWS)
    return pl.cdiv(pl.cdiv(num_rows, row_blocks), tile) * tile, row_blocks


def see_nothing(o_ref: Ref, m_ref: Ref, l_ref: Ref) -> None:
    """Writes the part of rows that saw nothing: o [R, Dh], m and l [R, 1]."""
    o_ref[...] = jnp.zeros_like(o_ref)
    m_ref[...] = jnp.full_like(m_ref, HIDDEN)
    l_ref[...] = jnp.zeros_like(l_ref)


def absorb_slots(
    begin: jax.Array,
    length: jax.Array,
    first_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    part_refs: tuple[Ref, Ref, Ref],
    *,
    scale: float,
    softcap: float | None,
) -> None:
    """Adds one block of successive slots to a part in place.

    Args:
        begin: i32[], the block's first slot.
        length: i32[]; slots from here on are dead and may hold anything.
        first_ref: i32[R, 1], the first slot that each row sees.
        q_ref: [R, Dh].
        k_ref: [C, Dh].
        v_ref: [C, Dh].
        part_refs: o f32[R, Dh], m and l f32[R, 1].
        scale: factor of the scores.
        softcap: cap of the scores, or None.
    """
    size = k_ref.shape[0]
    slots = begin + lax.broadcasted_iota(jnp.int32, (1, size), 1)
    visible = (slots < length) & (slots >= first_ref[...])
    # A dead value may be NaN, which no weight of 0 removes. Chosen in float32, as bfloat16 cannot be everywhere.
    live = begin + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < length
    v = jnp.where(live, v_ref[...].astype(jnp.float32), 0.0).astype(v_ref.dtype)
    part = absorb_block(
        Partials(*(ref[...] for ref in part_refs)), q_ref[...], k_ref[...], v, visible, scale=scale, softcap=softcap
    )
    for ref, value in zip(part_refs, part, strict=True):
        ref[...] = value


def _kernel(starts_ref, lengths_ref, first_ref, q_ref, k_ref, v_ref, o_ref, m_ref, l_ref, *, steps, scale, softcap):
    """One block of slots for one block of rows: first [R, 1], q [R, Dh], k and v [C, Dh]; o [R, Dh], m and l [R, 1]."""
    row, step = pl.program_id(0), pl.program_id(3)
    size = k_ref.shape[0]
    begin = (pl.program_id(2) * steps + step) * size
    length = lengths_ref[row]

    @pl.when(step == 0)
    def _empty():
        see_nothing(o_ref, m_ref, l_ref)

    @pl.when((begin < length) & (begin + size > starts_ref[row]))
    def _absorb():
        absorb_slots(begin, length, first_ref, q_ref, k_ref, v_ref, (o_ref, m_ref, l_ref), scale=scale, softcap=softcap)
