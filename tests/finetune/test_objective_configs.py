"""Objectives from configs as they stand in YAML, and the errors of those that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.schema import build
from finetune.objective_configs import CrossEntropyConfig, ObjectiveConfig, make_objective
from finetune.state import Batch
from models.decoder import Decoder
from models.errors import InputError
from tests.support.toy_training import toy_model, toy_params

MAPS = [
    {"type": "cross_entropy", "z_loss": 1e-4},
    {"type": "emo", "variant": 2, "drop_gold": True, "max_ratio": 3.0},
    {"type": "distillation", "teacher": "qwen2.5-coder-1.5b-instruct", "direction": "reverse"},
]


def sized(vocab_size: int) -> Decoder:
    return Decoder(dataclasses.replace(toy_model().config, vocab_size=vocab_size))


@pytest.mark.parametrize("settings", MAPS, ids=lambda settings: settings["type"])
def test_every_config_makes_its_objective(settings):
    config = build(ObjectiveConfig, settings, "objective", {"": "train.yaml:1"})
    assert config.type == settings["type"]
    student = toy_model(), toy_params()
    objective = make_objective(config, *student, 50, teacher=student)
    rows = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(objective.context, objective.constants, Batch(rows, rows > 0, rows, rows))
    context = jax.tree.map(lambda value: jnp.ones(value.shape[1:], value.dtype), shapes)
    logits = jax.random.normal(jax.random.key(0), (4, 61))
    value, figures = objective.per_token(logits, rows[0], objective.constants, context)
    assert value.shape == (4,) and np.isfinite(value).all() and all(x.shape == (4,) for x in figures.values())
    np.testing.assert_allclose(figures["cross_entropy"], -jax.nn.log_softmax(logits)[:, 0], rtol=1e-5)


def test_the_costs_stay_whatever_becomes_of_the_start():
    """Training gives up the buffers that it starts from."""
    params = jax.tree.map(jnp.copy, toy_params())
    objective = make_objective(build(ObjectiveConfig, {"type": "emo"}, "", {"": "x"}), toy_model(), params, 50)
    jax.tree.map(lambda value: value.delete(), params)
    assert np.isfinite(objective.constants["embedding"]).all()


def test_what_does_not_fit_is_said():
    student, distil = (toy_model(), toy_params()), build(ObjectiveConfig, MAPS[2], "", {"": "x"})
    with pytest.raises(InputError, match="distillation needs a teacher"):
        make_objective(distil, *student, 50)
    with pytest.raises(InputError, match="the model has rows for 61 ids, but the tokenizer has 62"):
        make_objective(CrossEntropyConfig(), *student, 62)
    with pytest.raises(InputError, match="the teacher has rows for 49 ids, but the tokenizer has 50"):
        make_objective(distil, *student, 50, (sized(49), {}))
    with pytest.raises(InputError, match="z_loss must not be negative"):
        CrossEntropyConfig(z_loss=-1.0)
    with pytest.raises(InputError, match=r"'objective.teacher' is missing"):
        build(ObjectiveConfig, {"type": "distillation"}, "objective", {"": "x"})
    with pytest.raises(InputError, match="wanted .*1, 2.* got 3"):
        build(ObjectiveConfig, {"type": "emo", "variant": 3}, "objective", {"": "x"})
