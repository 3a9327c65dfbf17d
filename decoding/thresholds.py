"""Thresholds by bisection over the bits of floats: exact, and much cheaper than sorting.

Axis letters: B batch, V what is compared (the vocabulary, the neurons of a layer).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

LOWEST, HIGHEST = int(jnp.iinfo(jnp.int32).min), int(jnp.iinfo(jnp.int32).max)


def ordered(x: jax.Array) -> jax.Array:
    """Maps float32 to int32 that compare in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def highest(
    holds: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], low: int = LOWEST, high: int = HIGHEST
) -> jax.Array:
    """Returns the highest integer from low to high at which `holds` is true, i32[shape]; low, where it never is.

    Args:
        holds: i32[shape] -> bool[shape]; true up to some integer, and false from there on.
        shape: of the integers that are looked for side by side.
        low: the lowest that is possible.
        high: the highest.
    """

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounded up; the sum would overflow
        true = holds(middle)
        return jnp.where(true, middle, low), jnp.where(true, high, middle - 1)

    bounds = jnp.full(shape, low, jnp.int32), jnp.full(shape, high, jnp.int32)
    return jax.lax.fori_loop(0, (high - low).bit_length(), halve, bounds)[0]
