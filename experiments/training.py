"""A training run from its config: what is read, what is trained, what is measured, where it goes.

`experiments.train` runs one, tables of adapters run many. The folder of a run:

    config.yaml      the resolved config; starts the same run again
    metrics.jsonl    one line per logged step, and TensorBoard files in tensorboard/
    checkpoints/     what a run goes on from
    adapter/, model/ what was trained, at the end: an adapter alone, or every parameter
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.base_model import Base, load_base, objective_of, pairs_of
from experiments.config import dump_config, save_config
from experiments.generate import ensure_texts
from experiments.joining import encoder_tuning
from experiments.kept import locked
from experiments.train_config import TrainConfig
from experiments.train_dolphin import save_pair
from experiments.train_report import CompiledStep, Evaluator, Figures, Reporter
from finetune import state as states
from finetune.adapters import make_adapter
from finetune.adapters.adapter import Values, count, rebase, select
from finetune.adapters.gradients import sum_gradients
from finetune.adapters.saved import base_of, save_adapter
from finetune.checkpoints import Checkpoints
from finetune.data import TrainingData, read_data
from finetune.data_configs import OwnTextsData
from finetune.distributed import check_rows, global_batch, is_main, on_main, row_share
from finetune.emo import EmoConfig, cosine_spread
from finetune.lexical_units import LexicalUnitConfig, check_unused
from finetune.objectives import BatchObjective, Objective
from finetune.optimizers import learning_rate, make_optimizer
from finetune.packing import Batches
from finetune.rows import Rows
from finetune.run_log import RunLog
from finetune.state import Batch, Constants, Method, TrainState
from finetune.trainer import Hook, NotFinite, make_train_step, train
from models.dolphin import PARTS
from models.encoder_decoder import Network, network
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
    if checkpoints is not None and checkpoints.latest() is not None:
        notes += _check_same(config, batches, checkpoints.facts())
        state, frozen, _ = checkpoints.restore(state, frozen)
    schedule = learning_rate(config.optimizer, config.steps)
    step = make_train_step(base.model, objective, method, optimizer, schedule, mesh)
    constants = Constants(rebased(frozen), frozen, objective.constants)
    belongs_to = base.bases
    if config.adapter is not None and belongs_to is None:
        belongs_to = base_of(base.name, base.params)
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


# What decides where a run comes out; the rest of a config, and the learning rate, may change when it goes on.
_DECIDES = (
    *("model", "scratch", "growth", "join", "dtype", "adapter", "data", "objective", "optimizer"),
    *("dolphin", "batch_size", "length", "source_length", "packing"),
)


def _facts(config: TrainConfig, batches: Batches) -> dict[str, Any]:
    return {"config": dump_config(config), "data": batches.fingerprint}


def _check_same(config: TrainConfig, batches: Batches, facts: dict[str, Any]) -> tuple[str, ...]:
    """Returns what is to be said of going on; raises InputError where a checkpoint came of other settings or data."""
    import yaml

    now, then = (yaml.safe_load(text) for text in (dump_config(config), facts["config"]))
    for settings in (now, then):
        settings["optimizer"].pop("learning_rate", None)
    for name in (*_DECIDES, "seed"):
        if now[name] != then.get(name):
            raise InputError(
                f"the run in {config.run_dir} was started with another {name}: {then.get(name)!r}, now {now[name]!r}; "
                "choose another run_dir, or set it back to go on"
            )
    if batches.fingerprint != facts["data"]:
        raise InputError(f"the data is not what the run in {config.run_dir} was trained on; choose another run_dir")
    if now["steps"] == then["steps"]:
        return ()
    return (
        f"the run was planned for {then['steps']} updates and is now for {now['steps']}: what follows the plan (the "
        "learning rate, what an adapter gives up on the way) follows the new one from here on",
    )


def check_folder(folder: Path) -> None:
    """Raises InputError where a folder holds other things than a run's."""
    import yaml

    if not folder.exists() or (folder.is_dir() and not {path.name for path in folder.iterdir()} - {".lock"}):
        return
    if (folder / "checkpoints").is_dir():
        return
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        saved = None
    if not isinstance(saved, dict) or "run_dir" not in saved:
        raise InputError(f"{folder} is not empty and holds no run: choose another run_dir, or empty it")


def run_training(config: TrainConfig) -> Figures:
    """Trains, or goes on, to `config.steps` updates; returns the figures of the end.

    Raises:
        NotFinite: the loss or the gradient is not finite; the message says where the last good checkpoint is.
        InputError: whatever else the config has wrong about it, or a folder that cannot be written.
    """
    is_new = not config.run_dir.exists()
    with contextlib.ExitStack() as held:

        def open_folder() -> None:
            check_folder(config.run_dir)
            held.enter_context(locked(config.run_dir, "--run_dir"))

        on_main(open_folder)
        if isinstance(config.data, OwnTextsData):
            own = config.data
            on_main(lambda: ensure_texts(own.texts, own.generate, config.model, config.dtype))
        checkpoints = held.enter_context(Checkpoints(config.run_dir / "checkpoints", config.saving.keep))
        try:
            run = prepare(config, checkpoints)
        except InputError:
            if is_new and is_main():  # nothing was trained: leave no folder behind
                shutil.rmtree(config.run_dir, ignore_errors=True)
            raise
        on_main(lambda: save_config(config, config.run_dir / "config.yaml"))
        log = held.enter_context(RunLog(config.run_dir, int(run.state.step), config.steps, is_main()))
        try:
            return _train(config, run, checkpoints, log)
        except NotFinite as error:
            last = checkpoints.latest()
            where = "there is no checkpoint yet" if last is None else f"the last good checkpoint is of update {last}"
            raise NotFinite(
                f"{error}; {where}. Lower the learning rate and start the same run again, or start another one "
                "(run_dir) with a longer warm-up or harder clipping"
            ) from error


def _train(config: TrainConfig, run: Run, checkpoints: Checkpoints, log: RunLog) -> Figures:
    """Goes through the updates with their hooks; returns the last figures of every kind."""
    reporter, evaluate = Reporter(config, run, log), Evaluator(config.evaluation, run)
    log.text("config", dump_config(config))
    for note in (*run.data.notes, _about(run)):
        log.say(note)

    def measure(step: int, state: TrainState) -> None:
        reporter.measured(step, evaluate(state.trainable))

    def save(step: int, state: TrainState) -> None:
        checkpoints.save(state, run.constants.frozen, _facts(config, run.batches))
        reporter.skip()

    def batch(step: int) -> Batch:
        made = run.batches(step)
        made = run.objective.prepare(made, step) if isinstance(run.objective, BatchObjective) else made
        return global_batch(made, run.mesh)

    if int(run.state.step) >= config.steps:  # a run that was over already
        reporter.figures |= evaluate(run.state.trainable)
    hooks = [Hook(config.saving.every, save), Hook(config.evaluation.every or config.steps, measure)]
    state = train(run.step, run.state, run.constants, batch, config.steps, reporter.report, hooks)
    checkpoints.wait()
    _save_trained(config, run, state)
    return reporter.figures | _sizes(run, state)


def _about(run: Run) -> str:
    return (
        f"{run.name}: {count(run.state.trainable):,} trained numbers; {len(run.data.train):,} texts to train on, "
        f"{len(run.batches):,} updates an epoch; {len(run.data.test):,} texts held out"
    )


def _sizes(run: Run, state: TrainState) -> Figures:
    """Returns how many numbers are trained, move per update, are left at the end, the optimiser keeps; its bytes."""
    finished = run.method.finish(run.constants.frozen, state.trainable)[1]
    sizes = {"trainable": count(state.trainable), "finished": count(finished), "optimizer": count(state.opt_state)}
    sizes["moved"] = run.method.moved(state.trainable, int(state.step)) / int(state.step)
    if run.step.seconds:
        sizes["step_bytes"] = run.step.bytes(run.constants)
    return {f"size/{name}": float(value) for name, value in sizes.items()}


def _save_trained(config: TrainConfig, run: Run, state: TrainState) -> None:
    """Writes what was trained into the run's folder: an adapter alone, or the whole model."""
    from models.weights.orbax import save_model

    frozen, trainable = run.method.finish(run.constants.frozen, state.trainable)
    if config.dolphin is not None:
        save_pair(config, run, frozen, trainable)
        return
    if config.adapter is not None:
        save_adapter(config.run_dir / "adapter", config.adapter, frozen, trainable, run.belongs_to)
        return
    params = run.method.merge(run.constants.base, {}, trainable)
    save_model(config.run_dir / "model", network(run.model.config), params, run.tokenizer, replace=True)
