"""LoRA-SB: its start is AdamW's first update, and what its core learns is the projected full gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters import LoraSbConfig, make_adapter
from finetune.adapters.adapter import merge, select
from finetune.adapters.gradients import sum_gradients
from finetune.optimizers import OptimizerConfig, make_optimizer
from finetune.state import Constants, adapter_tuning, full_tuning
from models.errors import InputError
from tests.support.toy_training import OBJECTIVE, toy_batch, toy_model, toy_params, updates

RANK, ETA, RATE = 4, 1e-3, 0.3
TARGETS = ("q", "v", "up")
PLAIN = OptimizerConfig(type="sgd", learning_rate=RATE, schedule="constant", warmup=0, clip=None)


class Start:
    """The toy model with LoRA-SB, and the gradient that it came from."""

    def __init__(self) -> None:
        self.params, self.batch = toy_params(), toy_batch()
        self.kernels = select(self.params, TARGETS)
        self.gradients = sum_gradients(toy_model(), OBJECTIVE, self.params, self.kernels, [self.batch])
        self.adapter = make_adapter(LoraSbConfig(rank=RANK, first_step=ETA, targets=TARGETS))
        self.frozen, self.trainable = self.adapter.init(jax.random.key(0), self.kernels, self.gradients)

    def factors(self, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(
            np.asarray(x, np.float64)
            for x in (self.frozen[path]["a"], self.trainable[path]["core"], self.frozen[path]["b"])
        )


@pytest.fixture(scope="module")
def start() -> Start:
    return Start()


def test_the_start_is_the_best_approximation_of_the_first_update(start):
    for path, gradient in start.gradients.items():
        a, core, b = start.factors(path)
        np.testing.assert_allclose(a.T @ a, np.eye(RANK), atol=1e-5)
        np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-5)
        diagonal = np.diag(core)
        np.testing.assert_array_equal(core, np.diag(diagonal))
        assert (diagonal > 0).all() and (np.diff(diagonal) <= 0).all()
        update = -ETA * np.sign(np.asarray(gradient, np.float64))
        left = np.linalg.svd(update, compute_uv=False)[RANK:]
        np.testing.assert_allclose(np.square(update - a @ core @ b).sum(), np.square(left).sum(), rtol=1e-4)


def test_the_first_update_is_that_of_adamw_on_the_whole_kernels(start):
    """Full fine-tuning from the same data, one update: entries whose mean gradient is far above epsilon move by eta."""
    method = full_tuning(jax.tree.map(lambda x: x.dtype, start.params))
    config = OptimizerConfig(learning_rate=ETA, schedule="constant", warmup=0, clip=None)
    states, metrics, _ = updates(method, Constants({}, {}, OBJECTIVE.constants), start.params, [start.batch], config)
    after = select(states[1].trainable, TARGETS)
    for path, kernel in start.kernels.items():
        gradient = np.asarray(start.gradients[path])
        large = np.abs(gradient) / metrics[0]["tokens"] > 1000 * config.epsilon
        assert large.mean() > 0.8
        moved = np.asarray(after[path], np.float64) - np.asarray(kernel, np.float64)
        np.testing.assert_allclose(moved[large], -ETA * np.sign(gradient)[large], rtol=2e-3)


def test_an_entry_without_a_gradient_does_not_move():
    """sign(0) = 0: rows and columns that no gradient reached stay out of both subspaces."""
    gradient = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    gradient[2], gradient[:, 4] = 0, 0
    adapter = make_adapter(LoraSbConfig(rank=3))
    frozen, _ = adapter.init(jax.random.key(0), {"q": jnp.zeros((8, 6))}, {"q": jnp.asarray(gradient)})
    np.testing.assert_allclose(frozen["q"]["a"][2], 0, atol=1e-6)
    np.testing.assert_allclose(frozen["q"]["b"][:, 4], 0, atol=1e-6)


def test_eta_scales_the_core_and_leaves_the_subspaces(start):
    other = make_adapter(LoraSbConfig(rank=RANK, first_step=100 * ETA))
    frozen, trainable = other.init(jax.random.key(0), start.kernels, start.gradients)
    for path in start.kernels:
        for name in ("a", "b"):
            np.testing.assert_array_equal(frozen[path][name], start.frozen[path][name])
        np.testing.assert_allclose(trainable[path]["core"], 100 * start.trainable[path]["core"], rtol=1e-5)


def test_a_gradient_step_moves_the_kernel_by_the_projection(start):
    """The core's gradient is a^T g b^T, with g the full one at the same weights, so W moves by -rate P_u g P_v: of all
    updates within the two subspaces, the one nearest to a full step.
    """
    constants = Constants(start.params, start.frozen, OBJECTIVE.constants)
    states, metrics, _ = updates(adapter_tuning(start.adapter), constants, start.trainable, [start.batch], PLAIN)
    whole = merge(start.adapter, start.params, start.frozen, start.trainable)
    full = sum_gradients(toy_model(), OBJECTIVE, whole, select(whole, TARGETS), [start.batch])
    rng = np.random.default_rng(0)
    for path, gradient in full.items():
        a, before, b = start.factors(path)
        core = np.asarray(states[1].trainable[path]["core"], np.float64) - before
        step = -RATE * np.asarray(gradient, np.float64) / metrics[0]["tokens"]
        np.testing.assert_allclose(core, a.T @ step @ b.T, atol=1e-5 * np.abs(core).max(), rtol=1e-3)
        moved = a @ core @ b
        np.testing.assert_allclose(moved, a @ a.T @ step @ b.T @ b, atol=1e-5 * np.abs(step).max(), rtol=1e-3)
        for _ in range(5):
            elsewhere = moved + a @ rng.normal(0, np.abs(moved).max(), (RANK, RANK)) @ b
            assert np.linalg.norm(moved - step) < np.linalg.norm(elsewhere - step)


def test_the_subspaces_hold_more_of_the_gradient_than_random_ones(start):
    """cos(projected, full) at the start, summed over layers."""
    found, chance = 0.0, 0.0
    rng = np.random.default_rng(0)
    for path, gradient in start.gradients.items():
        g = np.asarray(gradient, np.float64)
        a, _, b = start.factors(path)
        found += np.linalg.norm(a.T @ g @ b.T) / np.linalg.norm(g)
        a, b = (np.linalg.qr(rng.standard_normal((width, RANK)))[0] for width in g.shape)
        chance += np.linalg.norm(a.T @ g @ b) / np.linalg.norm(g)
    assert found > 2 * chance, (found, chance)


def test_weight_decay_leaves_the_core_alone(start):
    """Without a gradient nothing moves."""
    config = OptimizerConfig(weight_decay=1.0, warmup=0)
    optimizer = make_optimizer(config, 1, adapter_tuning(start.adapter))
    zeros = jax.tree.map(jnp.zeros_like, start.trainable)
    with jax.numpy_dtype_promotion("standard"):
        moved, _ = optimizer.update(zeros, optimizer.init(start.trainable), start.trainable)
    jax.tree.map(np.testing.assert_array_equal, moved, zeros)


def test_bad_settings():
    for options, text in (
        ({"first_step": 0.0}, "first_step must be above 0, got 0.0"),
        ({"gradient_batches": 0}, "gradient_batches must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=text):
            LoraSbConfig(**options)
    with pytest.raises(InputError, match="LoRA-SB starts from the gradient of the loss"):
        make_adapter(LoraSbConfig()).init(jax.random.key(0), {"q": jnp.zeros((16, 16))}, None)
