"""The gradient pass against automatic differentiation of the loss of all batches at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters.adapter import replace_kernels, select
from finetune.adapters.gradients import sum_gradients
from finetune.trainer import summed_loss
from models.errors import InputError
from tests.support.toy_training import OBJECTIVE, toy_batch, toy_model, toy_params

TARGETS = ("k", "layers_1/mlp/down")
BATCHES = [toy_batch(2, seed=0), toy_batch(2, seed=1)]


@pytest.fixture(scope="module")
def kernels():
    return select(toy_params(), TARGETS)


@pytest.fixture(scope="module")
def found(kernels):
    return sum_gradients(toy_model(), OBJECTIVE, toy_params(), kernels, iter(BATCHES))


def test_batches_and_micro_batches_add_up(found, kernels):
    """Two batches of two micro-batches each: the gradient of the loss of all eight rows."""
    rows = jax.tree.map(lambda *parts: jnp.concatenate(parts).reshape(8, 12), *BATCHES)

    def loss(kernels):
        return summed_loss(toy_model(), OBJECTIVE, replace_kernels(toy_params(), kernels), None, rows)[0]

    expected = jax.jit(jax.grad(loss))(kernels)
    assert set(found) == set(kernels)
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path], gradient, atol=1e-5 * np.abs(gradient).max(), rtol=1e-4)


def test_gradients_of_bfloat16_kernels_are_added_in_float32(found):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy_params())
    rough = sum_gradients(toy_model(), OBJECTIVE, half, select(half, TARGETS), BATCHES)
    for path, gradient in found.items():
        assert rough[path].dtype == jnp.float32
        assert np.linalg.norm(rough[path] - gradient) < 0.05 * np.linalg.norm(gradient)


def test_what_gives_no_gradient_is_refused(kernels):
    batch = toy_batch()
    nothing = batch.replace(targets=jnp.zeros_like(batch.targets))
    for batches in ([nothing], []):
        with pytest.raises(InputError, match="no token to predict"):
            sum_gradients(toy_model(), OBJECTIVE, toy_params(), kernels, batches)
    broken = replace_kernels(toy_params(), {"layers_0/mlp/up": jnp.full((32, 48), jnp.nan, jnp.float32)})
    with pytest.raises(InputError, match="gradient of the loss in layers_0/attention/k is not finite"):
        sum_gradients(toy_model(), OBJECTIVE, broken, kernels, [batch])
