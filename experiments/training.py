"""A training run from its config: what is read, what is trained, what is measured, where it goes.

`experiments.train` runs one, tables of adapters run many. The folder of a run:

    config.yaml      the resolved config; starts the same run again
    metrics.jsonl    one line per logged step, and TensorBoard files in tensorboard/
    checkpoints/     what a run goes on from
    adapter/, model/ what was trained, at the end: an adapter alone, or every parameter
"""

import contextlib
import shutil

from experiments.config import dump_config, save_config
from experiments.generate import ensure_texts
from experiments.kept import locked
from experiments.prepared_run import Run, prepare
from experiments.resuming import check_folder, facts_of
from experiments.train_config import TrainConfig
from experiments.train_dolphin import save_pair
from experiments.train_report import Evaluator, Figures, Reporter
from finetune.adapters.adapter import count
from finetune.adapters.saved import save_adapter
from finetune.checkpoints import Checkpoints
from finetune.data_configs import OwnTextsData
from finetune.distributed import global_batch, is_main, on_main
from finetune.objectives import BatchObjective
from finetune.run_log import RunLog, last_figures
from finetune.state import Batch, TrainState
from finetune.trainer import Hook, NotFinite, train
from models.encoder_decoder import network
from models.errors import InputError


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
        checkpoints.save(state, run.constants.frozen, facts_of(config, run.batches, run.belongs_to))
        reporter.skip()

    def batch(step: int) -> Batch:
        made = run.batches(step)
        made = run.objective.prepare(made, step) if isinstance(run.objective, BatchObjective) else made
        return global_batch(made, run.mesh)

    if int(run.state.step) >= config.steps:  # a run that was over already
        reporter.figures |= last_figures(config.run_dir) | evaluate(run.state.trainable)
    # Measured before it is saved: a run that is over has measured its last state.
    hooks = [Hook(config.evaluation.every or config.steps, measure), Hook(config.saving.every, save)]
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
