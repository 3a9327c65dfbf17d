"""Block-sparse prefill for TPUs.

The grid is (N, query blocks, entries of a list). All query heads of a key/value head are rows of one block, g*C + c, so
that its keys are fetched once for them. The last axis runs in order and is as long as the longest list; behind the end
of a shorter one nothing is fetched (the index stays where it was) nor computed.

Axis letters: N batch rows times key/value heads, C positions of a block, R = G*C rows, Dh head width; else as in
`block_sparse_prefill`.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.block_sparse_prefill.lists import HeadBlocks, listed_block, num_listed
from pallas_kernels.flash_decode.partials import Partials, absorb_block
from pallas_kernels.flash_decode.tpu import see_nothing

MOST_ROWS = 1024  # of a block


def block_sparse_prefill_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    heads: Sequence[HeadBlocks],
    *,
    block: int,
    scale: float,
    softcap: float | None,
    interpret: compat.Interpret = False,
) -> jax.Array:
    """Returns [B, T, H, Dh].

    Args:
        q: [B, T, H, Dh].
        k: [B, K, S, Dh], S at least T and `block`.
        v: [B, K, S, Dh].
        lengths: i32[B], 0 to T; slots from here on may hold anything.
        heads: one per key/value head.
        block: C, a power of two; G*C at most 1024.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
        interpret: as `pallas_call` takes it.
    """
    (batch, num_positions, num_heads, head_dim), kv_heads = q.shape, k.shape[1]
    rows, query_blocks = num_heads // kv_heads * block, pl.cdiv(num_positions, block)
    folded = jnp.pad(q, ((0, 0), (0, query_blocks * block - num_positions), (0, 0), (0, 0)))
    folded = rearrange(folded, "b (i c) (k g) d -> (b k) (i g c) d", c=block, k=kv_heads)
    k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (k, v))
    sink, local = (jnp.tile(jnp.asarray(x, jnp.int32), batch) for x in zip(*heads, strict=True))
    steps = min(query_blocks, max(blocks.sink + blocks.local for blocks in heads))

    def at_rows(n, i, j, lengths, sink, local):
        return n, i, 0

    def at_slots(n, i, j, lengths, sink, local):
        last = num_listed(i, sink[n], local[n]) - 1
        return n, listed_block(jnp.minimum(j, last), i, sink[n], local[n]), 0

    out = pl.pallas_call(
        partial(_kernel, block=block, scale=scale, softcap=softcap),
        grid_spec=compat.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch * kv_heads, query_blocks, steps),
            in_specs=[
                pl.BlockSpec((None, rows, head_dim), at_rows),
                pl.BlockSpec((None, block, head_dim), at_slots),
                pl.BlockSpec((None, block, head_dim), at_slots),
            ],
            out_specs=pl.BlockSpec((None, rows, head_dim), at_rows),
            scratch_shapes=[compat.VMEM((rows, width), jnp.float32) for width in (head_dim, 1, 1)],
        ),
        out_shape=jax.ShapeDtypeStruct(folded.shape, q.dtype),
        compiler_params=compat.tpu_params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="block_sparse_prefill",
    )(jnp.repeat(lengths, kv_heads), sink, local, folded, k, v)
    out = rearrange(out, "(b k) (i g c) d -> b (i c) (k g) d", b=batch, i=query_blocks, c=block)
    return out[:, :num_positions]


def _kernel(lengths_ref, sink_ref, local_ref, q_ref, k_ref, v_ref, out_ref, *part_refs, block, scale, softcap):
    """One entry of a list: q [R, Dh], k, v [C, Dh]; out [R, Dh]; kept from step to step o [R, Dh], m and l [R, 1]."""
    row, query_block, step = (pl.program_id(axis) for axis in range(3))
    length, sink, local = lengths_ref[row], sink_ref[row], local_ref[row]

    @pl.when(step == 0)
    def _empty():
        see_nothing(*part_refs)

    @pl.when((step < num_listed(query_block, sink, local)) & (query_block * block < length))
    def _absorb():
        begin = listed_block(step, query_block, sink, local) * block
        slots = begin + lax.broadcasted_iota(jnp.int32, (1, block), 1)
        positions = query_block * block + (lax.broadcasted_iota(jnp.int32, (q_ref.shape[0], 1), 0) & (block - 1))
        visible = (slots <= positions) & (positions < length)
        # A dead value may be NaN, which no weight of 0 removes. Chosen in float32, as bfloat16 cannot be everywhere.
        live = begin + lax.broadcasted_iota(jnp.int32, (block, 1), 0) < length
        v = jnp.where(live, v_ref[...].astype(jnp.float32), 0.0).astype(v_ref.dtype)
        part = Partials(*(ref[...] for ref in part_refs))
        part = absorb_block(part, q_ref[...], k_ref[...], v, visible, scale=scale, softcap=softcap)
        for ref, value in zip(part_refs, part, strict=True):
            ref[...] = value

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish():
        o_ref, _, l_ref = part_refs
        out_ref[...] = (o_ref[...] / jnp.maximum(l_ref[...], jnp.finfo(jnp.float32).tiny)).astype(out_ref.dtype)
