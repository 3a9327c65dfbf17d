"""Scores of pages for GPUs, through the Triton backend of Pallas.

The grid is (N, row blocks, tiles of pages). A program takes the logical pages of its tile in turn, the first of every
page, then the second, and keeps the best. Every array in a kernel of this backend has a size that is a power of two.

Axis letters: N batch rows times key/value heads, R rows of queries, M pages, g logical pages of a page, Dh head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.flash_decode.gpu import blocks_of_rows
from pallas_kernels.flash_decode.partials import HIDDEN, product_precision

PAGES = 32  # of a tile


def page_scores_gpu(
    q: jax.Array,
    high: jax.Array,
    low: jax.Array,
    lengths: jax.Array,
    *,
    logical_size: int,
    interpret: compat.Interpret = False,
) -> jax.Array:
    """Returns f32[N, R, M]; for the arguments see `page_scores_reference`, `interpret` is as `pallas_call` takes it."""
    (num, num_rows, head_dim), (num_pages, logical) = q.shape, high.shape[1:3]
    rows, row_blocks = blocks_of_rows(num_rows, head_dim)
    tiles = pl.cdiv(num_pages, PAGES)
    q = jnp.pad(q, ((0, 0), (0, row_blocks * rows - num_rows), (0, 0)))
    bounds = [x.reshape(num, num_pages * logical, head_dim) for x in (high, low)]
    of_pages = pl.BlockSpec((None, num_pages * logical, head_dim), lambda n, r, m: (n, 0, 0))
    scores = pl.pallas_call(
        partial(_kernel, logical=logical, logical_size=logical_size),
        grid=(num, row_blocks, tiles),
        in_specs=[
            pl.BlockSpec((None,), lambda n, r, m: (n,)),
            pl.BlockSpec((None, rows, head_dim), lambda n, r, m: (n, r, 0)),
            of_pages,
            of_pages,
        ],
        out_specs=pl.BlockSpec((None, rows, PAGES), lambda n, r, m: (n, r, m)),
        out_shape=jax.ShapeDtypeStruct((num, row_blocks * rows, tiles * PAGES), jnp.float32),
        compiler_params=compat.gpu_params(num_warps=4, num_stages=2),
        interpret=interpret,
        name="page_scores",
    )(lengths, q, *bounds)
    return scores[:, :num_rows, :num_pages]


def _kernel(length_ref, q_ref, high_ref, low_ref, scores_ref, *, logical, logical_size):
    """One tile of P pages for one block of rows: q [R, Dh], high and low [M*g, Dh]; scores [R, P]."""
    q, length, last = q_ref[...], length_ref[...], high_ref.shape[0] - 1
    above, below = jnp.maximum(q, 0), jnp.minimum(q, 0)
    page = pl.program_id(2) * PAGES + lax.iota(jnp.int32, PAGES)

    def product(one, other):
        dimensions = (((1,), (1,)), ((), ()))
        return lax.dot_general(one, other, dimensions, product_precision(one.dtype), jnp.float32)

    best = jnp.full(scores_ref.shape, HIDDEN, jnp.float32)
    for i in range(logical):
        number = page * logical + i
        there = jnp.minimum(number, last)
        scores = product(above, high_ref[there, :]) + product(below, low_ref[there, :])
        best = jnp.maximum(best, jnp.where((number * logical_size < length)[None, :], scores, HIDDEN))
    scores_ref[...] = best
