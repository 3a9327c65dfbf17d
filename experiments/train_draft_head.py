"""Trains a head that drafts for a model: `python -m experiments.train_draft_head --config configs/train/medusa.yaml`.

Texts and hidden states come from `experiments.generate`; where they do not exist yet they are made first. A run is a
folder: run the same command again and it goes on where it stopped.

    config.yaml        the resolved config
    metrics.jsonl      one line per logged step, and TensorBoard files in tensorboard/; accept lengths on held-out text
    checkpoints/       what a run goes on from
    head.safetensors   the head with the longest accept length so far: what --head of experiments.decode takes
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from decoding.speculative.head_kinds import HEADS, HeadConfig
from decoding.speculative.medusa import MedusaConfig
from experiments.config import dump_config, load_config, save_config
from experiments.generate import ensure_texts
from experiments.kept import locked
from experiments.runtime import run_main, setup_runtime
from experiments.train_config import Saving
from finetune.draft_heads import HeadLoss
from finetune.optimizers import OptimizerConfig
from models.errors import InputError

_PROG = "python -m experiments.train_draft_head"


@dataclasses.dataclass(frozen=True)
class DraftHeadConfig:
    """A training run."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    dtype: Literal["float32", "bfloat16"] | None = None  # of the model; None: as stored (GGUF: float32)
    head: HeadConfig = MedusaConfig()
    texts: Path = Path("results/texts/smollm2-135m-instruct")  # the folder of experiments.generate
    generate: Path | None = Path("configs/generate/smollm2.yaml")  # makes it where it does not exist; null: an error
    loss: HeadLoss = HeadLoss()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)
    steps: int = 600  # updates in all
    batch_size: int = 8  # rows of an update
    length: int = 256  # tokens of a row, in which several texts may stand
    evaluate_every: int = 100  # updates between measurements on held-out text; the last one is measured too
    held_out: int = 32  # texts measured on, of each held-out split, at most
    saving: Saving = Saving()
    log_every: int = 10  # updates
    seed: int = 0  # of new values and of the order of texts
    run_dir: Path = Path("results/draft_heads/medusa")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "held_out", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 16:
            raise ValueError(f"length must be at least 16, got {self.length}")


class HeadRun:
    """A run, ready to go: data, update and measurement."""

    def __init__(self, config: DraftHeadConfig):
        """Reads the model, its texts and its hidden states.

        Raises:
            InputError: whatever is wrong with one of them.
        """
        import numpy as np

        from experiments.loading import Loader
        from finetune import draft_heads, hidden_store, self_texts
        from finetune.adapters.saved import base_of
        from finetune.optimizers import learning_rate, make_optimizer
        from finetune.packing import Batches
        from finetune.state import full_tuning

        self.config, self.kind = config, HEADS[config.head.type]
        model, self.params, _ = Loader(config.dtype).model(config.model)
        self.base = base_of(config.model, self.params)
        self.model = model
        texts = self_texts.read_texts(config.texts / "texts.jsonl", self.base)
        self.rows, mark = self_texts.as_rows(texts), self_texts.fingerprint(texts)
        layers = sorted({*self.kind.streams(config.head, model), model.config.num_layers})
        self.hidden = hidden_store.open_streams(config.texts / "hidden", self.base, mark, layers)
        self.split = {
            name: np.array([place for place, text in enumerate(texts) if text.split == name], np.int64)
            for name in self_texts.SPLITS
        }
        for name, chosen in self.split.items():
            if not len(chosen):
                raise InputError(f"{config.texts} has no text of the split {name}: generate more texts")
        own = draft_heads.index_rows(self.rows, self.split["train"])
        self.batches = Batches(own, batch_size=config.batch_size, length=config.length, seed=config.seed)
        self.trainer, self.constants = draft_heads.make_trainer(
            self.kind, config.head, model, self.params, config.loss, self.rows.tokens[own.tokens]
        )
        schedule = learning_rate(config.optimizer, config.steps)
        self.optimizer = make_optimizer(config.optimizer, config.steps, full_tuning(None))
        self.step = draft_heads.make_head_step(self.trainer, self.optimizer, schedule)
        self._ranks = draft_heads.make_ranks(self.trainer)
        self.facts = {"config": dump_config(config), "data": f"{mark} {self.batches.fingerprint}"}

    def fresh(self) -> Any:
        """Returns the state before the first update."""
        import jax

        from finetune.state import new_state

        values = self.kind.init(self.config.head, self.model, self.params, jax.random.key(self.config.seed))
        with jax.numpy_dtype_promotion("standard"):
            return new_state(values, self.optimizer)

    def batch(self, step: int) -> Any:
        """Returns the batch of an update."""
        from finetune.draft_heads import at_random_places, filled

        batch = filled(self.batches(step), self.rows, self.hidden)
        if self.config.loss.places is None:
            return batch
        return at_random_places(batch, self.config.head.offsets, self.config.loss.places, (self.config.seed, step))

    def measure(self, values: Any) -> tuple[Any, dict[str, float]]:
        """Returns accuracy and figures on held-out text (`finetune.head_figures`)."""
        from finetune.head_figures import all_ranks, figures_of

        def ranks(chosen: Sequence[int]) -> Any:
            return all_ranks(self._ranks, self.params, values, self.rows, self.hidden, chosen, self.config.length)

        calibration, test = (self.split[name][: self.config.held_out] for name in ("calibration", "test"))
        trees = functools.partial(self.kind.trees, self.config.head)
        return figures_of(ranks(calibration), ranks(test), self.rows, (calibration, test), trees)


# What decides where a run comes out; the rest of a config may change when it goes on.
_DECIDES = ("model", "dtype", "head", "texts", "loss", "optimizer", "steps", "batch_size", "length", "seed")
HEAD_NAME = "head.safetensors"  # when all updates are made; the best so far is in RUNNING until then
RUNNING = "best.safetensors"
BEST = "calibration_mat_16"  # the figure that the saved head is the best by; all others are of the test texts


def _check_same(config: DraftHeadConfig, run: HeadRun, facts: dict[str, Any]) -> None:
    import yaml

    now, then = (yaml.safe_load(text) for text in (run.facts["config"], facts["config"]))
    for name in _DECIDES:
        if now[name] != then[name]:
            raise InputError(
                f"the run in {config.run_dir} was started with another {name}: {then[name]!r}, now {now[name]!r}; "
                "choose another run_dir, or set it back to go on"
            )
    if run.facts["data"] != facts["data"]:
        raise InputError(f"the texts are not what the run in {config.run_dir} was trained on; choose another run_dir")


def run_training(config: DraftHeadConfig) -> dict[str, float]:
    """Trains, or goes on, to `config.steps` updates; returns the figures of the head that was saved."""
    from experiments.resuming import check_folder
    from finetune.checkpoints import Checkpoints
    from finetune.run_log import RunLog

    ensure_texts(config.texts, config.generate, config.model, config.dtype)
    run = HeadRun(config)
    check_folder(config.run_dir)
    with contextlib.ExitStack() as held:
        held.enter_context(locked(config.run_dir, "--run_dir"))
        checkpoints = held.enter_context(Checkpoints(config.run_dir / "checkpoints", config.saving.keep))
        state = run.fresh()
        if checkpoints.latest() is not None:
            _check_same(config, run, checkpoints.facts())
            state = checkpoints.restore(state, {}).state
        save_config(config, config.run_dir / "config.yaml")
        log = held.enter_context(RunLog(config.run_dir, int(state.step), config.steps))
        return _train(config, run, state, checkpoints, log)


def _train(config: DraftHeadConfig, run: HeadRun, state: Any, checkpoints: Any, log: Any) -> dict[str, float]:
    from finetune.adapters.adapter import count
    from finetune.saved_heads import SavedHead, load_draft_head, save_draft_head
    from finetune.trainer import Hook, train

    start, begin = int(state.step), time.perf_counter()
    path, best = config.run_dir / HEAD_NAME, config.run_dir / RUNNING
    if start == 0:  # what a run left that has no checkpoint is another run's
        best.unlink(missing_ok=True)
    there = next((file for file in (best, path) if file.exists()), None)
    figures = load_draft_head(there, run.base).figures if start and there else {}
    before = figures.get("minutes", 0.0)
    log.text("config", dump_config(config))
    log.say(
        f"{config.head.type} for {run.base.name}: {count(state.trainable):,} trained numbers; "
        f"{len(run.split['train'])} texts, {len(run.batches)} updates an epoch"
    )

    def report(step: int, metrics: dict[str, float]) -> None:
        log.advance(step)
        if step % config.log_every == 0 or step == config.steps:
            seconds = (time.perf_counter() - begin) / (step - start)
            log.figures(step, {f"train/{name}": value for name, value in metrics.items()} | {"perf/seconds": seconds})

    def save(step: int, state: Any) -> None:
        checkpoints.save(state, {}, run.facts)

    def measure(step: int, state: Any) -> None:
        nonlocal figures
        accuracy, found = run.measure(state.trainable)
        log.figures(step, {f"eval/{name}": value for name, value in found.items()})
        if found[BEST] > figures.get(BEST, 0.0):
            minutes = before + (time.perf_counter() - begin) / 60
            figures = {**found, "step": step, "minutes": minutes, "parameters": count(state.trainable)}
            save_draft_head(best, SavedHead(config.head, state.trainable, accuracy, figures, run.base))

    if start < config.steps:
        # Measured before it is saved: a run that is over has measured its last state.
        hooks = [Hook(config.evaluate_every, measure), Hook(config.saving.every, save)]
        train(run.step, state, run.constants, run.batch, config.steps, report, hooks)
        checkpoints.wait()
    if best.exists():
        best.replace(path)
    return figures


def ensure_draft_head(path: Path, train: Path | None, model: str, dtype: str | None) -> None:
    """Trains the head of a model where its file does not exist yet, in a run of the file's folder.

    Args:
        path: the head's file, called head.safetensors.
        train: a config of this main, for everything but the model and the folder; None: none can be trained.
        model: the model that it is to draft for.
        dtype: of the model.
    """
    if path.exists():
        return
    if train is None or path.name != HEAD_NAME:
        raise InputError(f"no such head: {path}; name a config of {_PROG} that trains it, and a file {HEAD_NAME}")
    config = load_config(DraftHeadConfig, ["--config", str(train)], prog=_PROG, description="")
    print(f"training the head {path} first ({train})", flush=True)
    run_training(dataclasses.replace(config, model=model, dtype=dtype, run_dir=path.parent))


def main() -> None:
    """Loads the config, trains, prints the figures."""
    config = load_config(DraftHeadConfig, prog=_PROG, description=(__doc__ or "").split("\n")[0])
    setup_runtime()
    figures = run_training(config)
    print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print(f"saved in {config.run_dir}/")


if __name__ == "__main__":
    run_main(main)
