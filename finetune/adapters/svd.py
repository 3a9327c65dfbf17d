"""Truncated singular value decomposition of a kernel, for methods that start from it."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=1)
def truncated_svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest singular values of a matrix and their vectors, exact, in float32.

    Args:
        matrix: [I, O], any float dtype.
        rank: R, how many to keep; at most min(I, O).

    Returns:
        (u f32[I, R], s f32[R], v f32[R, O]): (u * s) v is the best approximation of rank R; s is sorted, largest first.
        The columns of u and the rows of v are orthonormal, also where s is 0. A pair of vectors may change its sign
        from one device to another.
    """
    u, s, v = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]
