"""Block-sparse prefill for GPUs, through the Triton backend of Pallas.

The grid is (tiles of query rows, N): each program walks along its head's list, a part of a block at a time, and ends
where its rows do. Every array in a kernel of this backend has a size that is a power of two.

Axis letters: N batch rows times query heads, C positions of a block, Dh head width; else as in `block_sparse_prefill`.
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
from pallas_kernels.flash_decode.gpu import nothing_seen
from pallas_kernels.flash_decode.partials import Partials, absorb_block, normalize


def block_sparse_prefill_gpu(
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
        q: [B, T, H, Dh], Dh a power of two.
        k: [B, K, S, Dh], S at least T.
        v: [B, K, S, Dh].
        lengths: i32[B], 0 to T; slots from here on may hold anything.
        heads: one per key/value head.
        block: C, a multiple of 64.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
        interpret: as `pallas_call` takes it.
    """
    (batch, num_positions, num_heads, head_dim), (kv_heads, num_slots) = q.shape, k.shape[1:3]
    group = num_heads // kv_heads
    rows = 64 if head_dim <= 128 else 32
    tiles = pl.cdiv(num_positions, rows)
    queries = rearrange(q, "b t h d -> (b h) t d")
    queries = jnp.pad(queries, ((0, 0), (0, tiles * rows - num_positions), (0, 0)))
    k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (k, v))
    sink, local = (jnp.tile(jnp.repeat(jnp.asarray(x, jnp.int32), group), batch) for x in zip(*heads, strict=True))
    scalar = pl.BlockSpec((None,), lambda i, n: (n,))
    of_rows = pl.BlockSpec((None, rows, head_dim), lambda i, n: (n, i, 0))
    of_head = pl.BlockSpec((None, num_slots, head_dim), lambda i, n: (lax.div(n, group), 0, 0))
    out = pl.pallas_call(
        partial(_kernel, block=block, scale=scale, softcap=softcap),
        grid=(tiles, batch * num_heads),
        in_specs=[scalar, scalar, scalar, of_rows, of_head, of_head],
        out_specs=of_rows,
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=compat.gpu_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="block_sparse_prefill",
    )(jnp.repeat(lengths, num_heads), sink, local, queries, k, v)
    return rearrange(out[:, :num_positions], "(b h) t d -> b t h d", b=batch)


def _kernel(length_ref, sink_ref, local_ref, q_ref, k_ref, v_ref, out_ref, *, block, scale, softcap):
    """One tile of R query rows: q [R, Dh], k, v [S, Dh]; out [R, Dh]."""
    rows, num_slots = q_ref.shape[0], k_ref.shape[0]
    begin = pl.program_id(0) * rows
    length, sink, local = length_ref[...], sink_ref[...], local_ref[...]
    query_block, pieces = lax.div(begin, block), block // rows
    positions = begin + lax.iota(jnp.int32, rows)
    q = q_ref[...]

    def absorb(step, part):
        entry = listed_block(lax.div(step, pieces), query_block, sink, local)
        slots = entry * block + lax.rem(step, pieces) * rows + lax.iota(jnp.int32, rows)
        there = jnp.minimum(slots, num_slots - 1)  # the last block may reach beyond the cache
        visible = (slots[None, :] <= positions[:, None]) & (positions < length)[:, None]
        # A dead value may be NaN, which no weight of 0 removes.
        v = jnp.where((slots < length)[:, None], v_ref[there, :], jnp.zeros((), v_ref.dtype))
        return absorb_block(part, q, k_ref[there, :], v, visible, scale=scale, softcap=softcap)

    before = num_listed(query_block, sink, local) - 1  # the last entry is the rows' own block, read up to the rows
    steps = before * pieces + lax.div(begin - query_block * block, rows) + 1
    part = lax.fori_loop(0, jnp.where(begin < length, steps, 0), absorb, nothing_seen(q.shape))
    out_ref[...] = normalize(Partials(part.o, part.m[:, 0], part.l[:, 0])).astype(out_ref.dtype)
