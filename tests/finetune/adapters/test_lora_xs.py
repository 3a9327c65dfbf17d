"""LoRA-XS: factors from the kernel itself, and a core that starts as noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters import LoraConfig, LoraXsConfig, make_adapter
from finetune.adapters.adapter import merge

RANK = 4
U, S, V = np.linalg.svd(np.random.default_rng(0).standard_normal((20, 30)), full_matrices=False)
S = 2 * 0.8 ** np.arange(20)  # far enough apart for float32 to find their vectors
W = ((U * S) @ V).astype(np.float32)


@pytest.fixture(scope="module")
def start():
    adapter = make_adapter(LoraXsConfig(rank=RANK, alpha=8.0))
    return adapter, *adapter.init(jax.random.key(0), {"q": jnp.asarray(W)}, None)


def merged(adapter, frozen, core) -> np.ndarray:
    base = {"q": {"kernel": jnp.asarray(W)}}
    return np.asarray(merge(adapter, base, frozen, {"q": {"core": jnp.asarray(core, jnp.float32)}})["q"]["kernel"])


def test_the_factors_are_the_kernels_largest_directions(start):
    """Singular values stand in the first factor alone."""
    _, frozen, _ = start
    a, b = np.asarray(frozen["q"]["a"]), np.asarray(frozen["q"]["b"])
    np.testing.assert_allclose(a @ b, (U[:, :RANK] * S[:RANK]) @ V[:RANK], atol=1e-5)
    np.testing.assert_allclose(a.T @ a, np.diag(S[:RANK] ** 2), atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-5)


def test_the_core_starts_as_noise_of_deviation_1e_5():
    kernels = {path: jnp.asarray(W) for path in ("q", "v")}
    _, trainable = make_adapter(LoraXsConfig(rank=20)).init(jax.random.key(0), kernels, None)
    cores = [np.asarray(trainable[path]["core"]) for path in kernels]
    for core in cores:
        assert core.shape == (20, 20) and abs(core.mean()) < 2e-6
        np.testing.assert_allclose(core.std(), 1e-5, rtol=0.1)
    assert (cores[0] != cores[1]).any(), "two layers share their noise"


def test_a_core_of_ones_adds_the_kernels_own_best_approximation(start):
    """Scale 2: W + 2 W_r; and the same as LoRA with these factors."""
    adapter, frozen, _ = start
    expected = W + 2 * (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    np.testing.assert_allclose(merged(adapter, frozen, np.eye(RANK)), expected, atol=1e-5)
    twin = merge(make_adapter(LoraConfig(rank=RANK, alpha=8.0)), {"q": {"kernel": jnp.asarray(W)}}, {}, frozen)
    np.testing.assert_allclose(twin["q"]["kernel"], expected, atol=1e-5)


def test_the_core_stands_between_the_factors_as_it_is_written(start):
    """Entry (i, j) leads from direction i of the inputs to direction j of the outputs."""
    adapter, frozen, _ = start
    core = np.zeros((RANK, RANK), np.float32)
    core[0, 2] = 1
    moved = merged(adapter, frozen, core) - W
    np.testing.assert_allclose(np.abs(moved), 2 * np.abs(np.outer(U[:, 0] * S[0], V[2])), atol=1e-5)
