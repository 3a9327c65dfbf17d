"""Kernel values: the dense one, and a foreign one put into a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from models.kernels import Dense, Kernel, as_kernel
from models.layers import Linear


@struct.dataclass
class BasePlusLowRank:
    """base + a b, with base f32[I, O], a f32[I, R] and b f32[R, O]: defined here, unknown to the models."""

    base: jax.Array
    a: jax.Array
    b: jax.Array

    @property
    def shape(self):
        return self.base.shape

    def dot(self, x, dtype=None):
        return x @ self.base + (x @ self.a) @ self.b

    def materialize(self):
        return self.base + self.a @ self.b


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def low_rank_over(base, rank=3, size=0.3):
    return BasePlusLowRank(base, size * normal(1, base.shape[0], rank), size * normal(2, rank, base.shape[1]))


def test_dense():
    w, x = normal(0, 5, 7), normal(1, 2, 3, 5)
    kernel = Dense(w)
    assert kernel.shape == (5, 7)
    np.testing.assert_allclose(kernel.dot(x), np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kernel.materialize(), w)
    np.testing.assert_allclose(kernel.dot(jnp.eye(5, dtype=jnp.float32)), w, rtol=1e-6)
    half = Dense(w.astype(jnp.bfloat16))
    assert half.dot(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [None, jnp.float32])
@pytest.mark.parametrize("width", [6, 5])
def test_dense_of_one_row(width, dtype):
    """An even width takes the halves on a CPU."""
    w, x = normal(0, width, 7).astype(jnp.bfloat16), normal(1, 1, 1, width).astype(jnp.bfloat16)
    y = Dense(w).dot(x, dtype)
    assert y.shape == (1, 1, 7) and y.dtype == (dtype or jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=2e-2 if dtype is None else 1e-5)


def test_as_kernel():
    w = normal(0, 4, 4)
    assert isinstance(as_kernel(w), Dense)
    for kernel in (Dense(w), low_rank_over(w)):
        assert isinstance(kernel, Kernel) and as_kernel(kernel) is kernel
    assert not isinstance(w, Kernel), "an array has dot and shape too; it must not pass for a kernel"


def test_kernels_are_pytrees():
    kernel = low_rank_over(normal(0, 4, 6))
    doubled = jax.tree.map(lambda x: 2 * x, kernel)
    assert isinstance(doubled, BasePlusLowRank)
    np.testing.assert_allclose(doubled.base, 2 * kernel.base)
    assert len(jax.tree.leaves({"kernel": Dense(kernel.base)})) == 1


@pytest.mark.parametrize("use_bias", [False, True])
def test_linear_over_a_foreign_kernel(use_bias):
    x, kernel = normal(3, 2, 5), low_rank_over(normal(0, 5, 7))
    params = {"kernel": kernel} | ({"bias": normal(4, 7)} if use_bias else {})
    dense = params | {"kernel": kernel.materialize()}
    layer = Linear(7, use_bias)
    out = layer.apply({"params": params}, x)
    np.testing.assert_allclose(out, layer.apply({"params": dense}, x), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def logits(tiny):
    """The tiny model's logits as a jitted function of its flattened parameters."""
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 61, (2, 9)), jnp.int32)
    return jax.jit(lambda flat: tiny[0].apply({"params": unflatten_dict(flat, sep="/")}, tokens).logits)


@pytest.mark.parametrize("path", ["layers_1/attention/k/kernel", "layers_2/mlp/down/kernel"])
def test_a_foreign_kernel_equals_its_matrix_in_a_decoder(tiny, logits, path):
    flat = flatten_dict(tiny[1], sep="/")
    kernel = low_rank_over(flat[path])
    mixed = logits(flat | {path: kernel})
    np.testing.assert_allclose(mixed, logits(flat | {path: kernel.materialize()}), rtol=1e-4, atol=1e-4)
    assert np.abs(mixed - logits(flat)).max() > 0.1, "the low-rank part has no effect"


def test_gradients_reach_the_parts_of_a_kernel():
    x = normal(3, 2, 5)
    grads = jax.grad(lambda kernel: Linear(7).apply({"params": {"kernel": kernel}}, x).sum())(
        low_rank_over(normal(0, 5, 7))
    )
    assert isinstance(grads, BasePlusLowRank)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
