"""The list of blocks that a head reads, as an expression: what both kernels walk along."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class HeadBlocks(NamedTuple):
    """Which blocks a streaming head reads.

    Attributes:
        sink: first blocks of the prompt, at least 0.
        local: last blocks up to a query's own, that one included, at least 1.
    """

    sink: int
    local: int


def num_listed(query_block: jax.Array, sink: jax.Array, local: jax.Array) -> jax.Array:
    """Returns how many key blocks a query block reads; all i32[]."""
    return jnp.minimum(query_block + 1, sink + local)


def listed_block(n: jax.Array, query_block: jax.Array, sink: jax.Array, local: jax.Array) -> jax.Array:
    """Returns the n-th key block that a query block reads, in rising order, the last being its own; all i32[]."""
    left_out = jnp.maximum(query_block + 1 - sink - local, 0)
    return n + jnp.where(n < sink, 0, left_out)
