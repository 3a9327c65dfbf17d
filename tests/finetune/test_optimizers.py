"""Schedules by their values, and the chain of the optimiser by what it does to planted gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finetune.adapters import LoraConfig, make_adapter
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.state import Method, adapter_tuning
from models.errors import InputError

METHOD = adapter_tuning(make_adapter(LoraConfig()))
VALUES = {"matrix": jnp.full((2, 2), 2.0, jnp.float32), "vector": jnp.full((2,), 2.0, jnp.float32)}


def rates(steps: int, **options) -> list[float]:
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, **options), steps)
    with jax.numpy_dtype_promotion("standard"):
        return [float(schedule(jnp.int32(step))) for step in range(steps)]


def test_schedules():
    np.testing.assert_allclose(rates(4, schedule="constant", warmup=0), [1, 1, 1, 1])
    np.testing.assert_allclose(rates(4, schedule="linear", warmup=0), [1, 0.75, 0.5, 0.25], rtol=1e-6)
    half = np.cos(np.pi * np.arange(4) / 4) / 2 + 0.5
    np.testing.assert_allclose(rates(4, schedule="cosine", warmup=0), half, rtol=1e-6)


def test_a_warm_up_rises_to_the_peak_from_its_first_update():
    """As a number of updates or as a share of all; the fall begins at the peak."""
    expected = [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(rates(8, schedule="linear", warmup=4), expected, rtol=1e-6)
    np.testing.assert_allclose(rates(8, schedule="linear", warmup=0.5), expected, rtol=1e-6)
    np.testing.assert_allclose(rates(3, schedule="constant", warmup=1), [1, 1, 1])
    np.testing.assert_allclose(rates(3, schedule="cosine", warmup=3), [1 / 3, 2 / 3, 1], rtol=1e-6)
    assert rates(10, warmup=0.03)[0] == 1.0, "a share below half an update is no warm-up"


def update(values, grads, config: OptimizerConfig, method: Method = METHOD, count: int = 1):
    optimizer = make_optimizer(config, 10, method)
    state = optimizer.init(values)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(count):
            updates, state = optimizer.update(grads, state, values)
            values = optax.apply_updates(values, updates)
    return values


def sgd(**options) -> OptimizerConfig:
    return OptimizerConfig(type="sgd", learning_rate=0.5, schedule="constant", warmup=0, **options)


def test_plain_descent_and_clipping():
    """Gradients of norm 5: as they are, or cut to norm 1."""
    grads = {"matrix": jnp.asarray([[3.0, 0.0], [0.0, 0.0]]), "vector": jnp.asarray([0.0, 4.0])}
    for clip, factor in ((None, 1.0), (1.0, 0.2), (10.0, 1.0)):
        moved = update(VALUES, grads, sgd(clip=clip))
        expected = jax.tree.map(lambda value, grad, f=factor: value - 0.5 * f * grad, VALUES, grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, expected)


def test_weight_decay_is_decoupled_and_of_matrices_only():
    """A rate of 0.5 and a decay of 0.1 leave 0.95 of a matrix, and all of a vector or of an exempt value."""
    zeros = jax.tree.map(jnp.zeros_like, VALUES)
    moved = update(VALUES, zeros, sgd(weight_decay=0.1))
    np.testing.assert_allclose(moved["matrix"], 0.95 * VALUES["matrix"], rtol=1e-6)
    np.testing.assert_array_equal(moved["vector"], VALUES["vector"])
    exempt = METHOD._replace(no_decay=frozenset({"matrix"}))
    moved = update({"q": VALUES}, {"q": zeros}, sgd(weight_decay=0.1), exempt)["q"]
    np.testing.assert_array_equal(moved["matrix"], VALUES["matrix"])


def test_adamw_against_its_formula():
    """Three updates, each number by itself, in float64."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule="linear", warmup=2, weight_decay=0.2, beta1=0.8, beta2=0.9, epsilon=1e-3, clip=None
    )
    moved = update({"matrix": jnp.asarray([[2.0]])}, {"matrix": jnp.asarray([[0.5]])}, config, count=3)
    value, first, second = 2.0, 0.0, 0.0
    for step, rate in enumerate((0.05, 0.1, 0.1), start=1):
        first, second = 0.8 * first + 0.2 * 0.5, 0.9 * second + 0.1 * 0.25
        direction = (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.9**step)) + 1e-3)
        value -= rate * (direction + 0.2 * value)
    np.testing.assert_allclose(moved["matrix"], [[value]], rtol=1e-5)


def test_the_methods_hook_stands_around_everything():
    """It sees the run's length, and its word on the update is the last."""
    seen = []

    def hook(inner, steps):
        seen.append(steps)
        return optax.chain(inner, optax.scale(0.0))

    grads = jax.tree.map(jnp.ones_like, VALUES)
    moved = update(VALUES, grads, sgd(weight_decay=0.1), METHOD._replace(hook=hook))
    jax.tree.map(np.testing.assert_array_equal, moved, VALUES)
    assert seen == [10]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"learning_rate": -1.0}, "must not be negative, got -1.0"),
        ({"warmup": float("nan")}, "must not be negative, got 0.0003, nan"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"clip": 0.0}, r"clip must be above 0 \(or null for no clipping\), got 0.0"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(InputError, match=text):
        OptimizerConfig(**options)
