"""Tables of training: every row is a way to train the same model on the same data for the same number of updates.

Each row is run for each of its learning rates (and seeds); the one with the least held-out cross-entropy at the end is
shown. A run that is finished is kept; one that was interrupted goes on from its last checkpoint. A table may have rows
of texts too: what the trained models write (`experiments.train_texts`).
"""

import dataclasses
import functools
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Literal

from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.resuming import other_settings
from experiments.table_config import TableFrame
from experiments.train_config import TrainConfig, check_shared
from experiments.train_texts import Continuations, Loaded, TextMeasure, TextRow
from finetune.adapters import AdapterConfig
from finetune.objective_configs import CrossEntropyConfig, ObjectiveConfig
from finetune.trainer import NotFinite
from models.errors import InputError
from models.growth import GrowthConfig
from models.router_losses import LOSSES

Figures = dict[str, float]
BASE = "base"  # the row of the model before it is trained further
HELD_OUT = "eval/cross_entropy"  # what rows are told apart by, whatever their objective


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """A way to train."""

    name: str = "full"
    adapter: AdapterConfig | None = None  # None: every parameter
    objective: ObjectiveConfig = CrossEntropyConfig()
    growth: GrowthConfig | None = None  # makes the model deeper, or its context longer, first
    learning_rates: tuple[float, ...] = (1e-3,)  # each is tried
    paper: str = ""  # what the paper reports, in words and figures


@dataclasses.dataclass(frozen=True)
class TrainClaim:
    """Something a paper says that the table can answer: row's measure is above `factor` times than's, or below it."""

    text: str = ""
    row: str = ""
    than: str = ""
    measure: str = "eval/exact_match"
    factor: float = 1.0
    below: bool = False


@dataclasses.dataclass(frozen=True)
class TrainPreset:
    """How much is trained."""

    base_steps: int = 100  # updates of the model that the rows start from
    steps: int = 50  # updates of each row
    examples: int = 64  # held-out questions that are answered, or texts that are continued
    rows: tuple[str, ...] = ()  # which; none: all
    rates: int | None = None  # learning rates of each row, from its first; None: all
    seeds: int = 1  # runs of each row and rate: the order of the training rows, and of samples

    def __post_init__(self) -> None:
        if min(self.base_steps, self.steps, self.examples, self.seeds) < 1 or (
            self.rates is not None and self.rates < 1
        ):
            raise ValueError("base_steps, steps, examples, rates and seeds must be at least 1")


@dataclasses.dataclass(frozen=True)
class TrainPresets:
    """The sizes that a table can be run at."""

    smoke: TrainPreset = TrainPreset(4, 3, 4)
    cpu: TrainPreset = TrainPreset()
    gpu: TrainPreset = TrainPreset(2000, 500, 512)


@dataclasses.dataclass(frozen=True)
class TrainTableConfig(TableFrame):
    """A table of training runs."""

    type: Literal["training"] = "training"
    table: str = "adapters"
    start: TrainConfig | None = None  # trains the model that rows start from; None: they start from `run.model`
    run: TrainConfig = TrainConfig()  # what all rows share
    rows: tuple[TrainRow, ...] = (TrainRow(),)
    texts: tuple[TextRow, ...] = ()  # what the trained models write; none: they write nothing
    continuations: Continuations = Continuations()
    claims: tuple[TrainClaim, ...] = ()
    presets: TrainPresets = TrainPresets()

    def __post_init__(self) -> None:
        rows, texts = ([row.name for row in kind] for kind in (self.rows, self.texts))
        names = [BASE, *rows, *texts]
        self.check_rows([*rows, *texts], reserved=(BASE,))
        for row in self.texts:
            if not {row.of, row.sharp_as or BASE} <= {BASE, *rows}:
                raise ValueError(f"texts {row.name!r} must be of rows that are trained: {', '.join([BASE, *rows])}")
        self.check_presets(rows)
        check_shared("run", self.run)
        if not self.run.evaluation.batches:
            raise ValueError("run.evaluation.batches must be at least 1: rows are told apart by their held-out loss")
        self.check_claims(names)


def measure(config: TrainTableConfig) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Returns ({row: figures}, {row of texts: figures}), running what is not yet kept."""
    shared, size = shared_run(config, train_base(config)), config.size
    plan = [(row, rate) for row in config.chosen for rate in row.learning_rates[: size.rates]]
    tried: dict[str, list[Figures]] = {}
    for done, (row, rate) in enumerate(plan, 1):
        runs = [run_cell(config.folder, row, rate, seed, shared) for seed in range(size.seeds)]
        figures = averaged([found for found, _ in runs])
        tried.setdefault(row.name, []).append(figures)
        asked = f"  exact match {figures['eval/exact_match']:.3f}" if "eval/exact_match" in figures else ""
        kept = "  (kept)" if all(was_kept for _, was_kept in runs) else ""
        print(
            f"{done:>3}/{len(plan)} {row.name:<20} rate {rate:<8g} loss {figures[HELD_OUT]:.4f}{asked}{kept}",
            flush=True,
        )
    best = {name: min(found, key=lambda figures: figures[HELD_OUT]) for name, found in tried.items()}
    return best, measure_texts(config, shared, best)


def shared_run(config: TrainTableConfig, model: str) -> TrainConfig:
    """Returns what the runs of all rows share, from the model that they start from."""
    evaluation = dataclasses.replace(config.run.evaluation, every=0, examples=config.size.examples)
    return dataclasses.replace(config.run, model=model, scratch=None, steps=config.size.steps, evaluation=evaluation)


def measure_texts(config: TrainTableConfig, shared: TrainConfig, best: dict[str, Figures]) -> dict[str, Figures]:
    """Returns {row of texts: figures}; rows whose model was not trained at this size are left out."""
    found: dict[str, list[Figures]] = {}
    for seed in range(config.size.seeds):
        paths = {name: _run_folder(config.folder, name, row["learning_rate"], seed) for name, row in best.items()}
        load = functools.cache(functools.partial(_load, shared.model, paths))
        measures = TextMeasure(
            config.continuations, shared.data, shared.length, config.size.examples, load, config.folder / "texts"
        )
        for row in config.texts:
            of = {row.of, row.sharp_as or BASE} - {BASE}
            if of <= {name for name, figures in best.items() if math.isfinite(figures[HELD_OUT])}:
                keys = [json.loads((paths[name] / "figures.json").read_text("utf-8"))["key"] for name in sorted(of)]
                found.setdefault(row.name, []).append(measures(row, seed, cell_key(shared.model, keys)))
                print(f"texts {row.name}, seed {seed}", flush=True)
    return {name: averaged(figures) for name, figures in found.items()}


def _load(base: str, paths: dict[str, Path], name: str) -> Loaded:
    """Returns the model of a trained row, or the one that rows start from."""
    from finetune.adapters.saved import with_adapter
    from models.weights.load import load_model

    if name != BASE and (paths[name] / "model").is_dir():
        model, params, tokenizer = load_model(str(paths[name] / "model"))
    else:
        model, params, tokenizer = load_model(base)
    if tokenizer is None:
        raise InputError(f"{base} has no tokenizer.json: put the model's tokenizer.json into the folder")
    if name != BASE and (paths[name] / "adapter").is_dir():
        params = with_adapter(paths[name] / "adapter", base, params)
    return model, params, tokenizer


def averaged(runs: list[Figures]) -> Figures:
    """Returns the mean of each figure over runs and, of several runs, its standard error as `<name>/error`.

    Where one of the runs came to nothing (a loss that is not finite), so did all of them.
    """
    for run in runs:
        if not math.isfinite(run.get(HELD_OUT, 0.0)):
            return run
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    values = {name: [run[name] for run in runs] for name in shared}
    figures = {name: statistics.fmean(found) for name, found in values.items()}
    if len(runs) > 1:
        figures |= {f"{name}/error": statistics.stdev(v) / len(runs) ** 0.5 for name, v in values.items()}
    return figures


def train_base(config: TrainTableConfig) -> str:
    """Trains the model that rows start from, where that is asked for and not done; returns its folder or name.

    Where it was trained with other settings, it and the rows that started from it are given up.
    """
    from experiments.training import run_training

    if config.start is None:
        return config.run.model
    folder = config.folder / BASE
    base = dataclasses.replace(config.start, steps=config.size.base_steps, run_dir=folder)
    if folder.is_dir() and other_settings(base):
        for old in (folder, config.folder / "runs", config.folder / "texts"):
            shutil.rmtree(old, ignore_errors=True)
    if not (folder / "model").is_dir():
        print(f"training the model that all rows start from, {base.steps} updates", flush=True)
        run_training(base)
    return str(folder / "model")


def cell_config(folder: Path, row: TrainRow, rate: float, seed: int, shared: TrainConfig) -> TrainConfig:
    """Returns the config of one run of a row."""
    return dataclasses.replace(
        shared,
        adapter=row.adapter,
        objective=row.objective,
        growth=row.growth,
        optimizer=dataclasses.replace(shared.optimizer, learning_rate=rate),
        seed=seed,
        run_dir=_run_folder(folder, row.name, rate, seed),
    )


def _run_folder(folder: Path, row: str, rate: float, seed: int) -> Path:
    return folder / "runs" / (f"{row}-{rate:g}" + (f"-seed{seed}" if seed else ""))


def run_cell(folder: Path, row: TrainRow, rate: float, seed: int, shared: TrainConfig) -> tuple[Figures, bool]:
    """Returns (the figures of one run, whether they were kept from before)."""
    from experiments.training import run_training

    run = cell_config(folder, row, rate, seed, shared)
    path, key = run.run_dir / "figures.json", cell_key(dump_config(run))
    kept = read_kept(path, key)
    if kept is not None:
        return with_held_out(kept["figures"]), True
    if run.run_dir.is_dir() and (path.is_file() or other_settings(run)):
        shutil.rmtree(run.run_dir)
    try:
        figures = run_training(run)
    except NotFinite as error:
        print(f"{row.name}, rate {rate:g}: {error}", flush=True)
        figures = {HELD_OUT: math.inf}
    figures["learning_rate"] = rate
    keep(path, key, figures=figures)
    shutil.rmtree(run.run_dir / "checkpoints", ignore_errors=True)
    return with_held_out(figures), False


def with_held_out(figures: Figures) -> Figures:
    """Returns the figures with the held-out cross-entropy: the loss, but for routers', where no other is minimised."""
    if HELD_OUT in figures:
        return figures
    return {HELD_OUT: figures["eval/loss"] - sum(figures.get(f"eval/{name}", 0.0) for name in LOSSES), **figures}
