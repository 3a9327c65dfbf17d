"""Scores of pages for TPUs.

The grid is (N, tiles of pages, row blocks), so that a tile's bounds are fetched once. All logical pages of a page lie
in one row of the bounds, g * Dh numbers; the queries are laid out g times, in a block diagonal, so that one product
gives the scores of all of them, those of logical page i in rows i * R on. The best of them is then a maximum over row
blocks, and nothing moves between lanes. The zeros cost products that the matrix unit has to spare: the time goes into
reading.

Axis letters: N batch rows times key/value heads, R rows of queries, M pages, g logical pages of a page, Dh head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.flash_decode.partials import HIDDEN, product_precision

PAGES = 128  # of a tile
ROWS = 32  # most rows of a block


def page_scores_tpu(
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
    tile = 8 if q.dtype == jnp.float32 else 16
    row_blocks = pl.cdiv(num_rows, ROWS)
    rows = pl.cdiv(pl.cdiv(num_rows, row_blocks), tile) * tile
    pages, width = min(PAGES, num_pages), logical * head_dim
    q = jnp.pad(q, ((0, 0), (0, row_blocks * rows - num_rows), (0, 0)))
    wide = (
        q.reshape(num, row_blocks, 1, rows, 1, head_dim) * jnp.eye(logical, dtype=q.dtype)[None, None, :, None, :, None]
    )
    wide = rearrange(wide, "n x i r j d -> n x (i r) (j d)")
    of_rows = pl.BlockSpec((None, None, logical * rows, width), lambda n, m, x, lengths: (n, x, 0, 0))
    of_pages = pl.BlockSpec((None, pages, width), lambda n, m, x, lengths: (n, m, 0))
    scores = pl.pallas_call(
        partial(_kernel, logical=logical, logical_size=logical_size),
        grid_spec=compat.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num, pl.cdiv(num_pages, pages), row_blocks),
            in_specs=[of_rows, of_rows, of_pages, of_pages],
            out_specs=pl.BlockSpec((None, rows, pages), lambda n, m, x, lengths: (n, x, m)),
        ),
        out_shape=jax.ShapeDtypeStruct((num, row_blocks * rows, num_pages), jnp.float32),
        compiler_params=compat.tpu_params("parallel", "parallel", "parallel"),
        interpret=interpret,
        name="page_scores",
    )(
        *(lengths, jnp.maximum(wide, 0), jnp.minimum(wide, 0)),
        *(x.reshape(num, num_pages, width) for x in (high, low)),
    )
    return scores[:, :num_rows]


def _kernel(lengths_ref, above_ref, below_ref, high_ref, low_ref, scores_ref, *, logical, logical_size):
    """One tile of P pages, one block of R rows: above, below [g*R, g*Dh], high, low [P, g*Dh]; scores [R, P]."""
    rows, pages = scores_ref.shape

    def product(one, other):
        dimensions = (((1,), (1,)), ((), ()))
        return lax.dot_general(one, other, dimensions, product_precision(one.dtype), jnp.float32)

    scores = product(above_ref[...], high_ref[...]) + product(below_ref[...], low_ref[...])
    page = pl.program_id(1) * pages + lax.broadcasted_iota(jnp.int32, (1, pages), 1)
    best = jnp.full((rows, pages), HIDDEN, jnp.float32)
    for i in range(logical):
        live = (page * logical + i) * logical_size < lengths_ref[pl.program_id(0)]
        best = jnp.maximum(best, jnp.where(live, scores[i * rows : (i + 1) * rows], HIDDEN))
    scores_ref[...] = best
