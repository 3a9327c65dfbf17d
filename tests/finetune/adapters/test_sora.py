import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finetune.adapters import LoraConfig, SoraConfig, make_adapter
from finetune.adapters.adapter import attach, count, merge, select
from finetune.adapters.sora import proximal, staged, threshold
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, adapter_tuning
from models.errors import InputError
from tests.support.toy_training import toy_batch, toy_model, toy_params, updates

TARGETS = ("q", "down")
RATE = OptimizerConfig(learning_rate=2e-2, warmup=0, weight_decay=0.1)


def start(**options):
    config = SoraConfig(**{"rank": 6, "alpha": 12.0, "targets": TARGETS} | options)
    adapter = make_adapter(config)
    return adapter, *adapter.init(jax.random.key(1), select(toy_params(), TARGETS), None)


def trained(steps, **options):
    """(adapter, frozen, values after each update, values at the start first)."""
    adapter, frozen, trainable = start(**options)
    constants = Constants(toy_params(), frozen, None)
    states, _, _ = updates(adapter_tuning(adapter), constants, trainable, [toy_batch()] * steps, RATE)
    return adapter, frozen, [state.trainable for state in states]


@jax.jit
def logits(params):
    return toy_model().apply({"params": params}, toy_batch().tokens[0]).logits


def gates(values):
    return np.concatenate([values[path]["gate"] for path in sorted(values)])


def test_the_soft_threshold_minimises_what_it_says():
    x, z = np.linspace(-2, 2, 81), np.linspace(-2, 2, 40001)
    best = z[np.argmin(0.5 * (z[None] - x[:, None]) ** 2 + 0.3 * np.abs(z[None]), axis=1)]
    np.testing.assert_allclose(threshold(jnp.asarray(x, jnp.float32), jnp.float32(0.3)), best, atol=1e-4)


def test_the_soft_threshold_is_odd_exactly_zero_near_zero_and_never_widens_a_distance():
    x, xi = jnp.asarray(np.arange(-200, 201) / 200, jnp.float32), jnp.float32(0.25)
    y = threshold(x, xi)
    assert np.array_equal(y, -threshold(-x, xi))
    assert np.all(np.asarray(y)[np.abs(np.asarray(x)) <= 0.25] == 0)
    assert np.all(np.abs(np.diff(np.asarray(y))) <= np.diff(np.asarray(x)) + 1e-7)
    kept = [np.count_nonzero(threshold(x, jnp.float32(t))) for t in np.linspace(0, 1, 21)]
    assert kept == sorted(kept, reverse=True) and kept[0] == 400 and kept[-1] == 0


def test_the_released_codes_operator():
    x = jnp.asarray([0.5, 1.0, 1.5, 1.9, 2.5, -1.5, -3.0], jnp.float32)
    assert threshold(x, jnp.float32(1.0), "code").tolist() == [0.0, 1.0, 0.0, 0.0, 1.5, 0.0, -2.0]


def test_thresholds_take_turns():
    schedule = staged((0.1, 0.2, 0.4), 10)
    expected = [0.1] * 4 + [0.2] * 3 + [0.4] * 4  # update 10 is behind the end
    np.testing.assert_allclose([schedule(jnp.int32(step)) for step in range(11)], expected)


@pytest.mark.parametrize("operator", ["soft", "code"])
def test_a_gate_that_was_cut_comes_back_under_a_strong_gradient(operator):
    optimizer = proximal(optax.sgd(1.0), lambda count: jnp.float32(0.1), operator)
    values = {"m": {"gate": jnp.asarray([0.05, 0.05]), "a": jnp.asarray([0.05, 0.05])}}
    state, seen = optimizer.init(values), []
    for gradient in (jnp.zeros(2), jnp.asarray([-0.5, -0.05])):
        moves, state = optimizer.update({"m": {"gate": gradient, "a": gradient}}, state, values)
        values = optax.apply_updates(values, moves)
        seen.append(values["m"]["gate"].tolist())
    assert seen[0] == [0.0, 0.0]
    np.testing.assert_allclose(seen[1], [0.4, 0.0], rtol=1e-6)
    np.testing.assert_allclose(values["m"]["a"], [0.55, 0.1], rtol=1e-6)


def test_the_first_update_moves_gates_by_the_threshold_alone():
    """With b = 0 neither gates nor a have a gradient."""
    _, _, (before, after) = trained(1, thresholds=(0.2,))
    np.testing.assert_allclose(gates(after), threshold(gates(before), jnp.float32(0.2)), atol=1e-7)
    for path, values in before.items():
        assert np.any(after[path]["b"] != values["b"])


def test_without_a_threshold_nothing_is_added_to_the_optimiser():
    adapter, frozen, (*_, values) = trained(5, thresholds=(0.0,))
    method = adapter_tuning(adapter)._replace(hook=lambda inner, steps: inner)
    _, _, trainable = start()
    states, _, _ = updates(method, Constants(toy_params(), frozen, None), trainable, [toy_batch()] * 5, RATE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), values, states[-1].trainable)


def test_a_huge_threshold_gives_the_model_back():
    adapter, frozen, (_, values) = trained(1, thresholds=(100.0,))
    assert not gates(values).any()
    attached = logits(attach(adapter, toy_params(), frozen, values))
    assert np.array_equal(attached, logits(toy_params()))
    frozen, values = adapter.finish(frozen, values)
    assert values == {} and frozen == {}
    jax.tree.map(np.testing.assert_array_equal, merge(adapter, toy_params(), frozen, values), toy_params())


def test_gates_become_exactly_zero_and_finish_leaves_a_plain_lora():
    adapter, frozen, (*_, values) = trained(20, thresholds=(0.0, 0.05, 0.1))
    zeros = np.count_nonzero(gates(values) == 0)
    assert 0 < zeros < gates(values).size
    before = logits(attach(adapter, toy_params(), frozen, values))
    assert np.max(np.abs(before - logits(toy_params()))) > 1e-2
    frozen, pruned = adapter.finish(frozen, values)
    np.testing.assert_allclose(logits(attach(adapter, toy_params(), frozen, pruned)), before, atol=1e-5)
    np.testing.assert_allclose(logits(merge(adapter, toy_params(), frozen, pruned)), before, atol=1e-5)
    kernels = select(toy_params(), TARGETS)
    left = {path: np.count_nonzero(values[path]["gate"]) for path in kernels}
    assert count(pruned) == sum(rank * sum(kernels[path].shape) for path, rank in left.items())
    # The rank may differ by layer; the scale stays that of the start.
    plain = make_adapter(LoraConfig(rank=6, alpha=12.0, targets=TARGETS))
    np.testing.assert_allclose(logits(attach(plain, toy_params(), {}, pruned)), before, atol=1e-5)


def test_a_layer_without_a_gate_left_is_left_out():
    adapter, frozen, trainable = start()
    gone, *others = sorted(trainable)
    trainable[gone]["gate"] = jnp.zeros(6)
    frozen, pruned = adapter.finish(frozen, trainable)
    assert sorted(pruned) == sorted(frozen) == others


def test_open_gates_are_lora():
    adapter, frozen, (*_, values) = trained(3)
    lora = make_adapter(LoraConfig(rank=6, alpha=12.0, targets=TARGETS))
    opened = {path: module | {"gate": jnp.ones(6)} for path, module in values.items()}
    plain = {path: {"a": module["a"], "b": module["b"]} for path, module in values.items()}
    ours, theirs = (
        logits(attach(method, toy_params(), frozen, values)) for method, values in ((adapter, opened), (lora, plain))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"thresholds": ()}, r"got \(\)"),
        ({"thresholds": (1e-4, -1.0)}, "none negative"),
        ({"thresholds": (float("nan"),)}, "nan"),
    ],
)
def test_what_cannot_be(options, told):
    with pytest.raises(InputError, match=told):
        SoraConfig(**options)
