import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finetune.adapters import LamdaConfig, LoraConfig, make_adapter
from finetune.adapters.adapter import attach, count, merge, rebase, select
from finetune.adapters.lamda import NEVER, frozen_after, progressive_freeze, residual
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, adapter_tuning
from models.errors import InputError
from models.kernels import LowRank
from tests.support.toy_training import toy_batch, toy_model, toy_params, updates

TARGETS = ("q", "k", "down")
STARTS = ["svd", "kaiming"]
RATE = OptimizerConfig(learning_rate=5e-3, warmup=0, schedule="constant", weight_decay=0.1)


def start(**options):
    """(adapter, base, frozen, trainable)."""
    config = LamdaConfig(**{"rank": 6, "alpha": 12.0, "targets": TARGETS} | options)
    adapter = make_adapter(config)
    frozen, trainable = adapter.init(jax.random.key(1), select(toy_params(), TARGETS), None)
    return adapter, rebase(adapter, toy_params(), frozen), frozen, trainable


def run(steps, **options):
    """(adapter, base, frozen, values after each update with those of the start first, losses)."""
    adapter, base, frozen, trainable = start(**options)
    batches = [toy_batch()] * steps
    states, metrics, _ = updates(adapter_tuning(adapter), Constants(base, frozen, None), trainable, batches, RATE)
    return adapter, base, frozen, [state.trainable for state in states], [figures["loss"] for figures in metrics]


@jax.jit
def logits(params):
    return toy_model().apply({"params": params}, toy_batch().tokens[0]).logits


@pytest.mark.parametrize("share", [Fraction(1, 10), Fraction(3, 10), Fraction(6, 10), Fraction(1), Fraction(2)])
@pytest.mark.parametrize(("rank", "steps"), [(1, 7), (6, 20), (32, 400), (64, 90)])
def test_rows_are_frozen_when_the_formula_says(rank, steps, share):
    due = frozen_after(rank, float(share) * steps)
    for step in range(steps + 1):
        assert np.count_nonzero(due <= step) == min(rank, math.floor(rank * step / (share * steps)))
    assert np.all(np.diff(due) >= 0) and due[0] > 0 and due[-1] == math.ceil(share * steps)


def test_all_rows_from_the_start_and_none_ever():
    assert frozen_after(4, 0.0).tolist() == [0] * 4
    assert frozen_after(4, math.inf).tolist() == [NEVER] * 4


def test_the_svd_start_is_the_model_with_its_largest_singular_values_trained():
    adapter, base, frozen, trainable = start()
    kernels, rests = select(toy_params(), TARGETS), select(base, TARGETS)
    for path, kernel in kernels.items():
        rest, values = rests[path], trainable[path]
        total = rest + 2.0 * frozen[path]["a"] @ values["core"] @ values["b"]
        np.testing.assert_allclose(total, kernel, atol=1e-5)
        sigma = np.linalg.svd(kernel, compute_uv=False)
        np.testing.assert_allclose(np.diag(values["core"]) * 2.0, sigma[:6], rtol=1e-4)
        np.testing.assert_allclose(np.linalg.svd(rest, compute_uv=False)[:-6], sigma[6:], atol=1e-5)
    np.testing.assert_allclose(logits(attach(adapter, base, frozen, trainable)), logits(toy_params()), atol=1e-4)


def test_the_kaiming_start_is_the_model_exactly():
    adapter, base, frozen, trainable = start(start="kaiming")
    assert base["layers_0"]["mlp"]["down"]["kernel"] is toy_params()["layers_0"]["mlp"]["down"]["kernel"]
    assert np.array_equal(logits(attach(adapter, base, frozen, trainable)), logits(toy_params()))
    for values in trainable.values():
        assert 0.8 < np.max(np.abs(values["core"])) * 6**0.5 <= 1


def test_a_residual_has_the_kernels_dtype():
    kernel = jax.random.normal(jax.random.key(0), (8, 5)).astype(jnp.bfloat16)
    rest = residual(kernel, {"a": jnp.eye(8)[:, :2]})
    assert rest.dtype == jnp.bfloat16 and not rest[:2].any() and np.array_equal(rest[2:], kernel[2:])


@pytest.mark.parametrize("mode", STARTS)
def test_counts(mode):
    _, _, frozen, trainable = start(start=mode)
    kernels = select(toy_params(), TARGETS)
    assert count(trainable) == sum(6 * 6 + 6 * kernel.shape[1] for kernel in kernels.values())
    assert count(frozen) == sum(6 * kernel.shape[0] for kernel in kernels.values())


@pytest.mark.parametrize("mode", STARTS)
def test_rows_stand_still_to_the_bit_once_they_are_frozen(mode):
    """Under AdamW with weight decay: momentum would move a row, decay would shrink it."""
    adapter, _, _, values, losses = run(20, start=mode, freeze_share=0.5)
    due, numbers = frozen_after(6, 10), 0
    for before, after, step in zip(values, values[1:], range(20), strict=False):
        for path in before:
            moved = np.any(before[path]["b"] != after[path]["b"], axis=1)
            assert moved.tolist() == (step < due).tolist()
            assert np.any(before[path]["core"] != after[path]["core"]) or step == 0
            numbers += before[path]["core"].size + moved.sum() * before[path]["b"].shape[1]
    assert adapter.moved(values[0], 20) == numbers
    assert losses[-1] < losses[0]


def test_stopping_gradients_alone_would_not_freeze():
    """What the masking of updates is for."""
    inner = optax.adamw(1e-2, weight_decay=0.1)
    values = {"m": {"b": jnp.ones((2, 3)), "core": jnp.ones((2, 2))}}
    ones = jax.tree.map(jnp.ones_like, values)
    optimizer = progressive_freeze(inner, 1.0)
    state, plain = optimizer.init(values), inner.init(values)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(ones, state, values)
        _, plain = inner.update(ones, plain, values)
        stopped, _ = inner.update({"m": {"b": jnp.zeros((2, 3)), "core": jnp.ones((2, 2))}}, plain, values)
        frozen, _ = optimizer.update(ones, state, values)
    assert np.all(stopped["m"]["b"] != 0) and not frozen["m"]["b"].any()
    np.testing.assert_array_equal(frozen["m"]["core"], stopped["m"]["core"])


def test_frozen_rows_do_not_count_when_gradients_are_clipped():
    optimizer = progressive_freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), 0.0)
    values = {"m": {"b": jnp.ones((2, 3)), "core": jnp.zeros((1, 1))}}
    grads = {"m": {"b": jnp.full((2, 3), 100.0), "core": jnp.full((1, 1), 0.5)}}
    moves, _ = optimizer.update(grads, optimizer.init(values), values)
    assert not moves["m"]["b"].any() and moves["m"]["core"].tolist() == [[-0.5]]


@pytest.mark.parametrize(("share", "moves"), [(0.0, False), (math.inf, True)])
def test_b_never_trained_and_always_trained(share, moves):
    _, _, _, values, _ = run(4, freeze_share=share)
    for path in values[0]:
        assert np.any(values[0][path]["b"] != values[-1][path]["b"], axis=1).tolist() == [moves] * 6
        assert np.any(values[-2][path]["b"] != values[-1][path]["b"], axis=1).tolist() == [moves] * 6


def layer(frozen=("a",)):
    """(loss of a layer's trained values, these, (x, a, core, b, cotangent)), I = 12, O = 7, R = 3, T = 5."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = ((5, 12), (12, 3), (3, 3), (3, 7), (5, 7), (12, 7))
    x, a, core, b, g, w = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    values = {"a": a, "core": core, "b": b}
    still = {name: values[name] for name in frozen}

    def loss(trained):
        return jnp.sum(g * LowRank(w, **(still | trained), scale=0.5).dot(x))

    return loss, {name: value for name, value in values.items() if name not in frozen}, (x, a, core, b, g)


def test_gradients_are_those_of_the_formula():
    loss, trained, (x, a, core, b, g) = layer()
    grads = jax.grad(loss)(trained)
    np.testing.assert_allclose(grads["core"], 0.5 * (x @ a).T @ g @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["b"], 0.5 * (x @ a @ core).T @ g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("frozen", "wide"), [(("a",), False), ((), True)])
def test_nothing_as_wide_as_the_input_is_made_for_the_gradient(frozen, wide):
    loss, trained, _ = layer(frozen)
    equations = jax.make_jaxpr(jax.grad(loss))(trained).jaxpr.eqns
    shapes = {tuple(out.aval.shape) for equation in equations for out in equation.outvars}
    assert bool(shapes & {(12, 3), (3, 12)}) == wide


@pytest.mark.parametrize("mode", STARTS)
def test_merged_and_attached_agree_and_fold_into_a_lora(mode):
    adapter, base, frozen, values, _ = run(5, start=mode)
    trained = values[-1]
    attached = logits(attach(adapter, base, frozen, trained))
    assert np.max(np.abs(attached - logits(toy_params()))) > 1e-3
    np.testing.assert_allclose(logits(merge(adapter, base, frozen, trained)), attached, atol=1e-5)
    folded = {path: {"a": frozen[path]["a"], "b": v["core"] @ v["b"]} for path, v in trained.items()}
    lora = make_adapter(LoraConfig(rank=6, alpha=12.0, targets=TARGETS))
    np.testing.assert_allclose(logits(attach(lora, base, {}, folded)), attached, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"alpha": 0.0}, "above 0"),
        ({"freeze_share": -0.1}, "0 or more"),
        ({"freeze_share": math.nan}, "0 or more, got nan"),
    ],
)
def test_what_cannot_be(options, told):
    with pytest.raises(InputError, match=told):
        LamdaConfig(**options)


def test_a_rank_above_a_side_is_refused():
    with pytest.raises(InputError, match="rank 17 is larger than the smaller side of layers_0/attention/k, 32 by 16"):
        start(rank=17)
