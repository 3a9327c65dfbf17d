"""Kernel values: the dense one, the corrected one, and a foreign one put into a whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from models.kernels import Dense, Kernel, LowRank, as_kernel, select
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


CORES = {"none": None, "diagonal": normal(6, 3), "full": normal(7, 3, 3)}


def corrected(core, base=None, scale=0.7):
    return LowRank(normal(0, 5, 7) if base is None else base, normal(1, 5, 3), core, normal(2, 3, 7), scale)


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_low_rank_against_its_formula(core):
    kernel, x = corrected(core), normal(3, 2, 4, 5)
    a, b, base = (np.asarray(part, np.float64) for part in (kernel.a, kernel.b, kernel.base))
    middle = np.eye(3) if core is None else np.diag(core) if core.ndim == 1 else np.asarray(core, np.float64)
    exact = base + 0.7 * a @ middle @ b
    assert isinstance(kernel, Kernel) and as_kernel(kernel) is kernel and kernel.shape == (5, 7)
    np.testing.assert_allclose(kernel.materialize(), exact, atol=1e-5)
    np.testing.assert_allclose(kernel.dot(x), np.asarray(x) @ exact, atol=1e-5)
    np.testing.assert_allclose(kernel.dot(normal(4, 1, 1, 5)), np.asarray(normal(4, 1, 1, 5)) @ exact, atol=1e-5)
    np.testing.assert_allclose(kernel.dot(jnp.eye(5, dtype=jnp.float32)), exact, atol=1e-5)


def test_low_rank_with_the_identity_in_its_middle():
    """No core, a diagonal of ones and the unit matrix are the same kernel."""
    cores = (None, jnp.ones((3,), jnp.float32), jnp.eye(3, dtype=jnp.float32))
    plain, *others = (corrected(core) for core in cores)
    for kernel in others:
        np.testing.assert_allclose(kernel.dot(normal(3, 2, 5)), plain.dot(normal(3, 2, 5)), atol=1e-6)
        np.testing.assert_allclose(kernel.materialize(), plain.materialize(), atol=1e-6)


def test_low_rank_over_another_kernel():
    for inner in (corrected(CORES["full"]), low_rank_over(normal(0, 5, 7))):
        outer, flat = corrected(CORES["diagonal"], inner), corrected(CORES["diagonal"], inner.materialize())
        np.testing.assert_allclose(outer.dot(normal(3, 2, 5)), flat.dot(normal(3, 2, 5)), atol=1e-5)
        np.testing.assert_allclose(outer.materialize(), flat.materialize(), atol=1e-5)


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_low_rank_in_bfloat16(core):
    """Factors of float32 over a base and inputs of bfloat16: the base's dtype, and the output's that was asked for."""
    kernel, x = corrected(core, normal(0, 5, 7).astype(jnp.bfloat16)), normal(3, 2, 5).astype(jnp.bfloat16)
    assert kernel.dot(x).dtype == kernel.materialize().dtype == jnp.bfloat16
    assert kernel.dot(x, jnp.float32).dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(corrected(core, kernel.base.astype(jnp.float32)).materialize())
    np.testing.assert_allclose(np.asarray(kernel.dot(x), np.float64), exact, atol=0.02 * np.abs(exact).max())


def test_low_rank_is_a_pytree_with_a_static_scale():
    kernel = corrected(CORES["full"])
    assert len(jax.tree.leaves(kernel)) == 4 and len(jax.tree.leaves(corrected(None))) == 3
    assert jax.tree.structure(kernel) != jax.tree.structure(kernel.replace(scale=0.8))
    doubled = jax.tree.map(lambda x: 2 * x, kernel)
    assert isinstance(doubled, LowRank) and doubled.scale == 0.7
    grads = jax.grad(lambda kernel: kernel.dot(normal(3, 2, 5)).sum())(kernel)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("base", [normal(0, 5, 7), corrected(CORES["full"])], ids=["dense", "low_rank"])
@pytest.mark.parametrize(("axis", "chosen"), [(0, [0, 3, 4]), (1, [1, 2, 5, 6]), (1, [])])
def test_selected_rows_and_columns(base, axis, chosen):
    kernel = select(base, jnp.asarray(chosen, jnp.int32), axis)
    exact = np.take(np.asarray(as_kernel(base).materialize()), np.asarray(chosen, int), axis=axis)
    assert isinstance(kernel, Kernel) and as_kernel(kernel) is kernel and kernel.shape == exact.shape
    np.testing.assert_array_equal(kernel.materialize(), exact)
    padded = select(base, jnp.asarray(chosen, jnp.int32), axis, spare=3)
    np.testing.assert_array_equal(padded.w, np.pad(exact, [(0, 3 * (side == axis)) for side in range(2)]))
    x = normal(3, 2, 4, exact.shape[0])
    np.testing.assert_allclose(kernel.dot(x), np.asarray(x) @ exact, atol=1e-5)
    assert kernel.dot(x.astype(jnp.bfloat16), jnp.float32).dtype == jnp.float32
    assert isinstance(kernel, Dense)


def test_linear_over_chosen_outputs_and_their_bias():
    x, chosen = normal(3, 2, 5), jnp.array([1, 4, 6])
    whole = {"kernel": normal(0, 5, 7), "bias": normal(4, 7)}
    part = {"kernel": select(whole["kernel"], chosen, 1), "bias": whole["bias"][chosen]}
    layer = Linear(7, use_bias=True)
    np.testing.assert_allclose(
        layer.apply({"params": part}, x), layer.apply({"params": whole}, x)[:, chosen], atol=1e-6
    )


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
