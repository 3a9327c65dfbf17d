"""The divergence by planted laws, the teacher's place beside the labels, and what a student comes to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from finetune.distillation import DistillationConfig, distillation, kl_divergence
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, full_tuning
from finetune.trainer import summed_loss
from models.decoder import Decoder
from models.errors import InputError
from tests.conftest import tiny_config
from tests.support.toy_training import toy_batch, toy_model, toy_params, updates

IDS = 58  # of the tokenizer; the student has 61 rows, the teacher 64


@pytest.fixture(scope="module")
def teacher():
    """(model, params) of one layer, another width and another padding; far from flat laws."""
    config = tiny_config()
    model = Decoder(dataclasses.replace(config, vocab_size=64, width=24, blocks=config.blocks[:1]))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda value: value * 12.0 if value.ndim == 2 else value, params)


def config(**changes) -> DistillationConfig:
    return DistillationConfig("teacher", **changes)


def test_divergence_of_planted_laws():
    p, q = np.array([[0.5, 0.25, 0.25], [1.0, 1e-30, 1e-30]]), np.array([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    found = kl_divergence(jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32)))
    np.testing.assert_allclose(found, [0.25 * np.log(2), np.log(5)], rtol=1e-5)


def texts_of(batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, targets) of each text that stands in a row."""
    rows = [np.asarray(value) for value in (batch.tokens, batch.targets, batch.segments)]
    return [
        (tokens[segments == text], targets[segments == text])
        for tokens, targets, segments in zip(*rows, strict=True)
        for text in (1, 2)
    ]


@pytest.mark.parametrize(
    "settings",
    [config(temperature=2.0, label_share=0.3), config(direction="reverse")],
    ids=["forward", "reverse"],
)
def test_the_sum_is_that_of_both_models_on_each_text_alone(teacher, settings):
    objective = distillation(settings, *teacher, IDS)
    batch = jax.tree.map(lambda value: value[0], toy_batch())
    batch = batch.replace(targets=batch.targets & (batch.segments > 0))
    read = jax.jit(lambda model, params, row: model.apply({"params": params}, row).logits[0], static_argnums=0)
    temperature, expected = settings.temperature, 0.0
    for tokens, targets in texts_of(batch):
        row = np.zeros((1, 12), np.int32)
        row[0, : len(tokens)] = tokens
        own, taught = (np.asarray(read(*both, row), np.float64) for both in ((toy_model(), toy_params()), teacher))
        for place in np.flatnonzero(targets[1:]):
            q, p = (np.exp(log_softmax(logits[place, :IDS] / temperature)) for logits in (own, taught))
            divergence = rel_entr(p, q).sum() if settings.direction == "forward" else rel_entr(q, p).sum()
            likelihood = -log_softmax(own[place])[tokens[place + 1]]
            expected += (1 - settings.label_share) * temperature**2 * divergence + settings.label_share * likelihood
    loss = jax.jit(lambda constants: summed_loss(toy_model(), objective, toy_params(), constants, batch, chunk=5))
    found, figures = loss(objective.constants)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert set(figures) == {"cross_entropy", "divergence", "tokens"}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_model_has_nothing_to_learn_from_itself(teacher, direction):
    objective = distillation(config(direction=direction, temperature=1.5), *teacher, IDS)
    residual = jax.random.normal(jax.random.key(2), (4, 24))
    own = teacher[0].apply({"params": teacher[1]}, residual, method="unembed")

    def loss(logits):
        return objective.per_token(logits, jnp.zeros(4, jnp.int32), objective.constants, residual)[0].sum()

    value, gradient = jax.value_and_grad(loss)(own)
    assert abs(value) < 1e-5 and jnp.abs(gradient).max() < 1e-5
    value, gradient = jax.value_and_grad(loss)(own[:, ::-1])
    assert value > 0.1 and jnp.abs(gradient).max() > 0.01


def test_a_student_comes_to_its_teacher(teacher):
    objective = distillation(config(direction="reverse"), *teacher, IDS)
    method = full_tuning(jax.tree.map(lambda value: value.dtype, toy_params()))
    settings = OptimizerConfig(learning_rate=0.02, schedule="constant", warmup=0)
    constants = Constants({}, {}, objective.constants)
    _, metrics, _ = updates(method, constants, toy_params(), [toy_batch()] * 30, settings, objective)
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["divergence"], rel=1e-5)
    assert metrics[-1]["divergence"] < 0.5 * metrics[0]["divergence"]


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="direction must be forward or reverse, got 'sideways'"):
        config(direction="sideways")
    with pytest.raises(InputError, match="temperature must be above 0"):
        config(temperature=0.0)
    with pytest.raises(InputError, match="label_share 0 to 1"):
        config(label_share=1.5)
