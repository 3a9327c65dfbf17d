"""Scores of pages in plain jnp: what they mean, and the form that XLA compiles.

Axis letters: N batch rows times key/value heads, R rows of queries, M pages, g logical pages of a page, Dh head width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_decode.partials import HIDDEN, product_precision


def page_scores_reference(
    q: jax.Array, high: jax.Array, low: jax.Array, lengths: jax.Array, *, logical_size: int
) -> jax.Array:
    """Returns f32[N, R, M], the score of the best logical page of each page, `HIDDEN` where none is live.

    Args:
        q: [N, R, Dh].
        high: [N, M, g, Dh], the highest key of each logical page, channel by channel.
        low: [N, M, g, Dh], the lowest.
        lengths: i32[N], live slots; a logical page that begins here or later is not live.
        logical_size: slots of a logical page.
    """

    def product(one: jax.Array, other: jax.Array) -> jax.Array:
        # All logical pages on one axis: with two the bounds would be turned round first.
        rows, precision = other.reshape(other.shape[0], -1, other.shape[3]), product_precision(q.dtype)
        found = jnp.einsum("nrd,nld->nrl", one, rows, precision=precision, preferred_element_type=jnp.float32)
        return found.reshape(*found.shape[:2], *other.shape[1:3])

    scores = product(jnp.maximum(q, 0), high) + product(jnp.minimum(q, 0), low)
    begin = jnp.arange(high.shape[1] * high.shape[2], dtype=jnp.int32).reshape(high.shape[1:3]) * logical_size
    return jnp.where(begin[None, None] < lengths[:, None, None, None], scores, HIDDEN).max(axis=3)
