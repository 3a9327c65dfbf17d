"""The truncated decomposition against NumPy's in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters.svd import truncated_svd


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_truncated_svd(shape, rank):
    matrix = np.random.default_rng(0).standard_normal(shape)
    u, s, v = truncated_svd(jnp.asarray(matrix, jnp.float32), rank)
    assert u.shape == (shape[0], rank) and s.shape == (rank,) and v.shape == (rank, shape[1])
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(v @ v.T, np.eye(rank), atol=1e-5)
    exact_u, exact_s, exact_v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(s, exact_s[:rank], rtol=1e-5)
    best = (exact_u[:, :rank] * exact_s[:rank]) @ exact_v[:rank]
    np.testing.assert_allclose((u * s[None, :]) @ v, best, atol=1e-5)


def test_vectors_are_orthonormal_where_values_vanish():
    """A matrix of rank 1, and of rank 0, in bfloat16."""
    for matrix in (jnp.ones((6, 5), jnp.bfloat16), jnp.zeros((6, 5), jnp.bfloat16)):
        u, s, v = truncated_svd(matrix, 3)
        assert u.dtype == s.dtype == v.dtype == jnp.float32
        np.testing.assert_allclose(s[1:], 0, atol=1e-5)
        np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-5)
        np.testing.assert_allclose(v @ v.T, np.eye(3), atol=1e-5)
