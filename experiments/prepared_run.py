"""A training run made ready from its config: model, data, method, state, and the update."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.base_model import Base, load_base, objective_of, pairs_of
from experiments.joining import encoder_tuning
from experiments.resuming import check_same, facts_of
from experiments.train_config import TrainConfig
from experiments.train_report import CompiledStep
from finetune import state as states
from finetune.adapters import make_adapter
from finetune.adapters.adapter import Values, rebase, select
from finetune.adapters.gradients import sum_gradients
from finetune.adapters.saved import base_of
from finetune.checkpoints import Checkpoints
from finetune.data import TrainingData, read_data
from finetune.data_configs import OwnTextsData
from finetune.distributed import check_rows, global_batch, row_share
from finetune.emo import EmoConfig, cosine_spread
from finetune.lexical_units import LexicalUnitConfig, check_unused
from finetune.objectives import BatchObjective, Objective
from finetune.optimizers import learning_rate, make_optimizer
from finetune.packing import Batches
from finetune.rows import Rows
from finetune.state import Batch, Constants, Method, TrainState
from finetune.trainer import make_train_step
from models.dolphin import PARTS
from models.encoder_decoder import Network
from models.errors import InputError
from models.sharding import build, make_mesh, place
from models.weights.tokenizer import Tokenizer


class Run(NamedTuple):
    """A run, ready to go: everything that an update needs.

    The model's own parameters are not among it: what an update reads of them is in `constants`. `belongs_to` is what an
    adapter says of them; None where all is trained.
    """

    name: str
    model: Network
    tokenizer: Tokenizer
    belongs_to: Any
    mesh: Mesh
    data: TrainingData
    batches: Batches
    held_out: tuple[Batch, ...]
    method: Method
    objective: Objective | BatchObjective
    constants: Constants
    state: TrainState
    step: Callable


def prepare(config: TrainConfig, checkpoints: Checkpoints | None) -> Run:
    """Reads and makes everything, and takes up the newest checkpoint where there is one."""
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size // config.accumulate, mesh)
    base = load_base(config, mesh)
    pairs = pairs_of(config, base.model, base.reader)
    writer = base_of(base.name, base.params) if isinstance(config.data, OwnTextsData) else None
    data = read_data(config.data, base.tokenizer, config.length, pairs, writer)
    if isinstance(config.objective, LexicalUnitConfig):
        check_unused(config.objective, (data.train, data.test), base.tokenizer)
    batches, test = _batches(config, data.train, mesh), config.evaluation.batches
    # Held-out rows are read by the micro-batch: what an update can hold, an evaluation can.
    part = dataclasses.replace(config, batch_size=config.batch_size // config.accumulate, accumulate=1)
    held_out = _batches(part, data.test, mesh) if len(data.test) and test else ()
    held_out = tuple(global_batch(held_out(step), mesh) for step in range(min(len(held_out), test)))
    objective = objective_of(config, base, mesh)
    if isinstance(objective, BatchObjective):  # it has no loss of a row by itself
        held_out = ()
    notes = (*data.notes, *_about_costs(config, objective))
    method, frozen, trainable, rebased = _method(config, base, mesh, objective, batches, checkpoints)
    optimizer = make_optimizer(config.optimizer, config.steps, method)
    with jax.numpy_dtype_promotion("standard"):
        own = _own_state(objective, method, (rebased(frozen), frozen, trainable), mesh)
        state = build(lambda trainable, own: states.new_state(trainable, optimizer, own), trainable, own, mesh=mesh)
    belongs_to = base.bases
    if config.adapter is not None and belongs_to is None:
        belongs_to = base_of(base.name, base.params)
    if checkpoints is not None and checkpoints.latest() is not None:
        notes += check_same(config, facts_of(config, batches, belongs_to), checkpoints.facts())
        state, frozen, _ = checkpoints.restore(state, frozen)
    schedule = learning_rate(config.optimizer, config.steps)
    step = make_train_step(base.model, objective, method, optimizer, schedule, mesh)
    constants = Constants(rebased(frozen), frozen, objective.constants)
    return Run(
        base.name,
        base.model,
        base.tokenizer,
        belongs_to,
        mesh,
        data._replace(notes=notes),
        batches,
        held_out,
        method,
        objective,
        constants,
        state,
        CompiledStep(step),
    )


def _own_state(objective: Objective | BatchObjective, method: Method, parts: tuple[Any, Any, Any], mesh: Mesh) -> Any:
    """Returns what an objective carries from update to update, before the first; `parts` make the parameters."""
    if not isinstance(objective, BatchObjective):
        return {}
    return build(lambda *parts: objective.start(method.attach(*parts)), *parts, mesh=mesh)


def _batches(config: TrainConfig, rows: Rows, mesh: Mesh) -> Batches:
    index, processes = row_share(mesh)
    return Batches(
        rows,
        batch_size=config.batch_size,
        length=config.length,
        accumulate=config.accumulate,
        packing=config.packing,
        seed=config.seed,
        process_index=index,
        process_count=processes,
    )


def _about_costs(config: TrainConfig, objective: Objective) -> tuple[str, ...]:
    """Returns how far EMO's costs tell tokens apart; nothing for other objectives."""
    if not isinstance(config.objective, EmoConfig):
        return ()
    mean, deviation = cosine_spread(objective.constants["embedding"])
    return (f"EMO's costs are 1 minus the cosines of the head's vectors: mean {mean:.3f}, deviation {deviation:.3f}",)


def _method(
    config: TrainConfig, base: Base, mesh: Any, objective: Objective, batches: Batches, checkpoints: Checkpoints | None
) -> tuple[Method, Values, Any, Callable[[Values], Any]]:
    """Returns (method, frozen, trainable, function from frozen values to the parameters that stay)."""
    if config.join is not None:
        return encoder_tuning(base.params, mesh)
    if config.adapter is None:
        dtypes = jax.tree.map(lambda value: value.dtype, base.params)
        trainable = jax.tree.map(lambda value: jnp.array(value, jnp.float32), base.params)
        return states.full_tuning(dtypes), {}, trainable, lambda frozen: {}
    adapter = make_adapter(config.adapter)
    kernels = select(base.params, config.adapter.targets)
    gradients = None
    if adapter.needs_gradients:
        if isinstance(objective, BatchObjective):
            raise InputError(f"{config.adapter.type} starts from gradients of tokens' losses: take another adapter")
        resumed = checkpoints is not None and checkpoints.latest() is not None
        # What a run goes on with is in its checkpoint; until that is read, anything of the right shape will do.
        gradients = kernels if resumed else _gradients(base, mesh, objective, kernels, batches, config)
    frozen, trainable = adapter.init(jax.random.key(config.seed), kernels, gradients)
    frozen, trainable = place(frozen, mesh), place(trainable, mesh)
    method = states.adapter_tuning(adapter)
    if config.dolphin is not None:
        whole = {name: jax.tree.map(lambda x: jnp.array(x, jnp.float32), base.params[name]) for name in PARTS}
        method, trainable = states.with_whole(method, PARTS), {"adapter": trainable, "whole": whole}
    return method, frozen, trainable, lambda frozen: rebase(adapter, base.params, frozen)


def _gradients(base: Base, mesh: Any, objective: Objective, kernels: Any, batches: Batches, config: TrainConfig) -> Any:
    first = (global_batch(batches(step), mesh) for step in range(config.adapter.gradient_batches))
    return sum_gradients(base.model, objective, base.params, kernels, first, mesh)
