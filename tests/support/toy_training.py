"""A two-layer model, a batch to learn by heart, and a run of a few updates, for the tests of training."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune.objectives import Objective, cross_entropy
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.state import Batch, Constants, Method, new_state
from finetune.trainer import make_train_step
from models.decoder import Decoder
from tests.conftest import tiny_config

OBJECTIVE = cross_entropy()


def toy_model(remat: bool = False) -> Decoder:
    """The tiny model's first two layers; the second has a sliding window of 6."""
    config = tiny_config()
    return Decoder(dataclasses.replace(config, blocks=config.blocks[:2]), remat)


@functools.cache
def toy_params() -> Any:
    """Parameters of `toy_model`, as it is initialised."""
    with jax.ensure_compile_time_eval():  # the first call may stand in a function that is being traced
        return jax.jit(toy_model().init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def toy_batch(parts: int = 1, rows: int = 4, seed: int = 0) -> Batch:
    """rows x 12 tokens in [parts, rows / parts, 12]: two texts and padding in a row, of lengths that differ by row.

    The tokens repeat a few; a third of them are not to be predicted.
    """
    rng = np.random.default_rng(seed)
    shape, places = (rows, 12), np.arange(12)
    first, last = rng.integers(3, 6, (rows, 1)), rng.integers(8, 13, (rows, 1))
    segments = np.where(places < first, 1, np.where(places < last, 2, 0))
    positions = np.where(places < first, places, np.where(places < last, places - first, 0))
    values = (rng.integers(0, 6, shape), (rng.random(shape) < 0.67) & (segments > 0), segments, positions)
    kinds = (jnp.int32, bool, jnp.int32, jnp.int32)
    arrays = [jnp.asarray(v.reshape(parts, -1, 12), kind) for v, kind in zip(values, kinds, strict=True)]
    return Batch(*arrays)


def updates(
    method: Method,
    constants: Constants,
    trainable: Any,
    batches: list[Batch],
    config: OptimizerConfig,
    objective: Objective = OBJECTIVE,
):
    """Makes one update per batch; returns (states, metrics of each, the jitted step); states[0] is the start."""
    optimizer = make_optimizer(config, len(batches), method)
    step = make_train_step(toy_model(), objective, method, optimizer, learning_rate(config, len(batches)))
    state = new_state(jax.tree.map(jnp.copy, trainable), optimizer)  # an update gives up its state's buffers
    states, metrics = [jax.device_get(state)], []
    for batch in batches:
        state, figures = step(state, constants, batch)
        states.append(jax.device_get(state))
        metrics.append({name: float(value) for name, value in figures.items()})
    return states, metrics, step
