"""The loss against a slow loop, one update however the batch is cut, and the order of things in the loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters import LoraConfig, make_adapter
from finetune.adapters.adapter import select
from finetune.objectives import Objective, cross_entropy
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, TrainState, adapter_tuning, full_tuning
from finetune.trainer import Hook, make_eval_step, summed_loss, train
from models.config import MLPConfig, MoEConfig
from models.decoder import Decoder
from models.errors import InputError
from tests.support.toy_training import OBJECTIVE, toy_batch, toy_model, toy_params, updates

PLAIN = OptimizerConfig(type="sgd", learning_rate=0.5, schedule="constant", warmup=0, clip=None)


def part_of(batch, index: int = 0):
    return jax.tree.map(lambda x: x[index], batch)


@pytest.fixture(scope="module")
def whole():
    """(states, metrics) of one plain update of every parameter on one micro-batch of four rows."""
    method = full_tuning(jax.tree.map(lambda x: x.dtype, toy_params()))
    return updates(method, Constants({}, {}, None), toy_params(), [toy_batch()], PLAIN)[:2]


def test_the_loss_against_a_slow_loop():
    """One text at a time, without packing: the mean of -log p over the tokens that are to be predicted."""
    batch, total, count = toy_batch(), 0.0, 0
    tokens, targets, segments, _ = (np.asarray(x[0]) for x in jax.tree.leaves(batch))
    plain = jax.jit(lambda tokens: jax.nn.log_softmax(toy_model().apply({"params": toy_params()}, tokens).logits))
    for row in range(4):
        for text in (1, 2):
            at = np.flatnonzero(segments[row] == text)
            padded = np.zeros((1, 12), np.int32)
            padded[0, : len(at)] = tokens[row, at]
            scores = np.asarray(plain(padded)[0], np.float64)
            for place in range(1, len(at)):
                if targets[row, at[place]]:
                    total, count = total - scores[place - 1, tokens[row, at[place]]], count + 1
    assert 10 < count < 30
    found, figures = jax.jit(lambda part: summed_loss(toy_model(), OBJECTIVE, toy_params(), None, part))(part_of(batch))
    assert figures["tokens"] == count
    np.testing.assert_allclose(found, total, rtol=1e-5)


def test_losses_of_routers_are_part_of_what_is_minimised():
    """As many times as there are tokens to predict, so that the mean has them once; and they train the router."""
    model = toy_model()
    experts = MoEConfig(4, 2, MLPConfig(24), balance_weight=0.5, z_weight=0.1)
    blocks = tuple(dataclasses.replace(block, mlp=experts) for block in model.config.blocks)
    model = Decoder(dataclasses.replace(model.config, blocks=blocks))
    bare = dataclasses.replace(experts, balance_weight=0.0, z_weight=0.0)
    without = Decoder(dataclasses.replace(model.config, blocks=tuple(dataclasses.replace(b, mlp=bare) for b in blocks)))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda w: 5.0 * w, params)

    def of(params, model):
        return summed_loss(model, OBJECTIVE, params, None, part_of(toy_batch()))

    found = {m: jax.jit(jax.value_and_grad(of, has_aux=True), static_argnums=1)(params, m) for m in (model, without)}
    (loss, figures), grads = found[model]
    (plain, none), plain_grads = found[without]
    assert set(none) == {"tokens"} and figures["balance_loss"] > figures["tokens"] * 0.9  # 0.5 times K = 2 at least
    np.testing.assert_allclose(loss, plain + figures["balance_loss"] + figures["router_z_loss"], rtol=1e-5)
    router, plain_router = (g["layers_0"]["mlp"]["router"]["kernel"] for g in (grads, plain_grads))
    assert jnp.abs(router - plain_router).max() > 1e-3
    np.testing.assert_allclose(jax.jit(of, static_argnums=1)(params, model)[0], loss, rtol=1e-6)


def contextual() -> Objective:
    """Weighs each token's loss by its position, which reaches the objective as context, and by a constant."""

    def per_token(logits, labels, constants, context):
        value, _ = OBJECTIVE.per_token(logits, labels, None, None)
        return constants * context["weight"] * value, {"weight": context["weight"]}

    def context(constants, batch):
        return {"weight": batch.positions.astype(jnp.float32) + 1.0}

    return Objective(per_token, jnp.float32(2.0), context)


def test_a_loss_in_chunks_is_the_loss():
    """Chunks that do not divide the batch: value, figures and gradient, of an objective with a context."""
    objective, part = contextual(), part_of(toy_batch())

    def loss(params, chunk):
        return summed_loss(toy_model(), objective, params, objective.constants, part, chunk)

    of = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (value, figures), grads = of(toy_params(), 10_000)
    (other, other_figures), other_grads = of(toy_params(), 7)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    assert set(figures) == set(other_figures) == {"tokens", "weight"}
    for name in figures:
        np.testing.assert_allclose(other_figures[name], figures[name], rtol=1e-5)
    wanted = np.asarray(part.targets[:, 1:] & (part.segments[:, 1:] == part.segments[:, :-1]))
    np.testing.assert_allclose(figures["weight"], (np.asarray(part.positions)[:, :-1] + 1)[wanted].sum(), rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), other_grads, grads)


def test_micro_batches_weigh_by_their_tokens(whole):
    """Four rows at once, or two and two with unequal numbers of tokens: the same update and metrics."""
    halves = toy_batch(parts=2)
    same_text = halves.segments[..., 1:] == halves.segments[..., :-1]
    counts = np.asarray(halves.targets[..., 1:] & same_text).sum((1, 2))
    assert counts[0] != counts[1], "equal counts would hide a mean of means"
    method = full_tuning(jax.tree.map(lambda x: x.dtype, toy_params()))
    states, metrics, _ = updates(method, Constants({}, {}, None), toy_params(), [halves], PLAIN)
    assert metrics[0]["tokens"] == sum(counts)
    for name, value in whole[1][0].items():
        np.testing.assert_allclose(metrics[0][name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[1].trainable, whole[0][1].trainable)


def test_a_plain_update_is_the_gradient_of_the_mean(whole):
    """Against automatic differentiation of the sum, divided by the number of tokens; norm and rate as they were."""
    states, metrics = whole
    loss = jax.jit(jax.value_and_grad(lambda p: summed_loss(toy_model(), OBJECTIVE, p, None, part_of(toy_batch()))[0]))
    value, grads = loss(toy_params())
    tokens = metrics[0]["tokens"]
    np.testing.assert_allclose(metrics[0]["loss"], value / tokens, rtol=1e-5)
    norm = np.sqrt(sum(np.square(np.asarray(g, np.float64) / tokens).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics[0]["grad_norm"], norm, rtol=1e-5)
    assert metrics[0]["learning_rate"] == 0.5 and states[1].step == 1
    expected = jax.tree.map(lambda p, g: p - 0.5 * g / tokens, toy_params(), grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), states[1].trainable, expected)


def test_evaluation_sums_the_loss_of_training(whole):
    _, metrics = whole
    adapter = make_adapter(LoraConfig(rank=2))
    frozen, trainable = adapter.init(jax.random.key(0), select(toy_params(), ("q",)), None)
    evaluate = make_eval_step(toy_model(), cross_entropy(), adapter_tuning(adapter))
    sums = evaluate(trainable, Constants(toy_params(), frozen, None), toy_batch(parts=2))
    assert sums["tokens"] == metrics[0]["tokens"]
    np.testing.assert_allclose(sums["loss"] / sums["tokens"], metrics[0]["loss"], rtol=1e-5)


def test_full_tuning_keeps_float32_values_and_runs_in_the_models_dtypes():
    method = full_tuning({"w": jnp.dtype(jnp.bfloat16), "b": jnp.dtype(jnp.float32)})
    values = {"w": jnp.full((2,), 1.001, jnp.float32), "b": jnp.full((2,), 1.001, jnp.float32)}
    params = method.attach({}, {}, values)
    assert params["w"].dtype == jnp.bfloat16 and params["b"].dtype == jnp.float32
    grads = jax.grad(lambda values: method.attach({}, {}, values)["w"].astype(jnp.float32).sum())(values)
    assert grads["w"].dtype == jnp.float32 and (grads["w"] == 1).all()


class Script:
    """A train step that says what is done when, and gives planned losses."""

    def __init__(self, losses: dict[int, float] | None = None) -> None:
        self.events: list[str] = []
        self.losses = losses or {}

    def step(self, state: TrainState, constants, batch):
        update = int(state.step) + 1
        self.events.append(f"update {update} of {batch}")
        metrics = {"loss": jnp.float32(self.losses.get(update, 1.0)), "grad_norm": jnp.float32(1.0)}
        return state.replace(step=jnp.int32(update)), metrics

    def report(self, step: int, metrics: dict[str, float]) -> None:
        assert metrics == {"loss": self.losses.get(step, 1.0), "grad_norm": 1.0}
        self.events.append(f"report {step}")

    def hook(self, name: str, every: int) -> Hook:
        def run(step, state):
            assert int(state.step) == step
            self.events.append(f"{name} {step}")

        return Hook(every, run)

    def train(self, steps: int, start: int = 0, hooks=()) -> TrainState:
        state = TrainState(jnp.int32(start), {}, {})
        return train(self.step, state, Constants({}, {}, None), "batch {}".format, steps, self.report, hooks)


def test_metrics_are_read_after_the_next_update_is_dispatched():
    script = Script()
    assert script.train(3).step == 3
    assert script.events == [
        "update 1 of batch 0",
        "update 2 of batch 1",
        "report 1",
        "update 3 of batch 2",
        "report 2",
        "report 3",
    ]


def test_hooks_run_behind_the_reports_of_all_updates_so_far():
    """Every so many updates and after the last one."""
    script = Script()
    script.train(3, hooks=[script.hook("save", 2), script.hook("look", 5)])
    assert [event for event in script.events if "update" not in event] == [
        "report 1",
        "report 2",
        "save 2",
        "report 3",
        "save 3",
        "look 3",
    ]


def test_a_run_goes_on_where_its_state_stands():
    script = Script()
    assert script.train(5, start=3).step == 5
    assert script.events == ["update 4 of batch 3", "update 5 of batch 4", "report 4", "report 5"]
    assert script.train(5, start=5).step == 5 and len(script.events) == 4, "a finished run is left alone"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_any_hook(value):
    script = Script({2: value})
    with pytest.raises(InputError, match=f"the loss of update 2 is {value}$"):
        script.train(4, hooks=[script.hook("save", 2)])
    assert not any("save" in event or event == "report 2" for event in script.events)
    assert "report 1" in script.events
