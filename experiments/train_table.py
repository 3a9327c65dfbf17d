"""Tables of training: every row is a way to train the same model on the same data for the same number of updates.

Each row is run once for each of its learning rates; the one with the least held-out loss at the end is shown, and what
it came to on questions that decided nothing. A run that is finished is kept; one that was interrupted goes on.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

from experiments.cells import cell_key
from experiments.config import dump_config
from experiments.train_config import TrainConfig
from finetune.adapters import AdapterConfig
from finetune.objective_configs import CrossEntropyConfig, ObjectiveConfig

Figures = dict[str, float]
BASE = "base"  # the row of the model before it is trained further


@dataclasses.dataclass(frozen=True)
class TrainRow:
    """A way to train."""

    name: str = "full"
    adapter: AdapterConfig | None = None  # None: every parameter
    objective: ObjectiveConfig = CrossEntropyConfig()
    learning_rates: tuple[float, ...] = (1e-3,)  # each is tried
    paper: str = ""  # what the paper reports, in words and figures


@dataclasses.dataclass(frozen=True)
class TrainClaim:
    """Something a paper says that the table can answer: row's measure is above `factor` times than's, or below it."""

    text: str = ""
    row: str = ""
    than: str = ""
    measure: str = "exact_match"
    factor: float = 1.0
    below: bool = False


@dataclasses.dataclass(frozen=True)
class TrainPreset:
    """How much is trained."""

    base_steps: int = 100  # updates of the model that the rows start from
    steps: int = 50  # updates of each row
    examples: int = 64  # questions that are answered, for choosing a learning rate and again for the table
    rows: tuple[str, ...] = ()  # which; none: all
    rates: int | None = None  # learning rates of each row, from its first; None: all


@dataclasses.dataclass(frozen=True)
class TrainPresets:
    """The sizes that a table can be run at."""

    smoke: TrainPreset = TrainPreset(4, 3, 4)
    cpu: TrainPreset = TrainPreset()
    gpu: TrainPreset = TrainPreset(2000, 500, 512)


@dataclasses.dataclass(frozen=True)
class TrainTableConfig:
    """A table of training runs."""

    type: Literal["training"] = "training"
    table: str = "adapters"  # its name, and its folder's
    title: str = ""
    start: TrainConfig | None = None  # trains the model that rows start from; None: they start from `run.model`
    run: TrainConfig = TrainConfig()  # what all rows share
    rows: tuple[TrainRow, ...] = (TrainRow(),)
    claims: tuple[TrainClaim, ...] = ()
    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    presets: TrainPresets = TrainPresets()
    out: Path | None = None  # None: results/<table>/<preset>

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if len({*names, BASE}) != len(names) + 1:
            raise ValueError(f"rows must have names of their own, and none may be called {BASE}")
        for claim in self.claims:
            if not {claim.row, claim.than} <= {*names, BASE}:
                raise ValueError(f"claim {claim.text!r} must compare rows of this table: {', '.join([BASE, *names])}")

    @property
    def size(self) -> TrainPreset:
        """The preset that is run."""
        return getattr(self.presets, self.preset)

    @property
    def chosen(self) -> tuple[TrainRow, ...]:
        """The rows that are run."""
        return tuple(row for row in self.rows if not self.size.rows or row.name in self.size.rows)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.out or Path("results") / self.table / self.preset


def measure(config: TrainTableConfig) -> dict[str, Figures]:
    """Returns {row: figures}, running what is not yet kept; the first row is the model that the others start from."""
    model = train_base(config)
    shared = dataclasses.replace(config.run, model=model, scratch=None, steps=config.size.steps)
    shared = dataclasses.replace(
        shared, evaluation=dataclasses.replace(shared.evaluation, every=0, examples=config.size.examples)
    )
    plan = [(row, rate) for row in config.chosen for rate in row.learning_rates[: config.size.rates]]
    tried: dict[str, list[Figures]] = {}
    for done, (row, rate) in enumerate(plan, 1):
        figures, kept = run_cell(config.folder, row, rate, shared)
        tried.setdefault(row.name, []).append(figures)
        print(
            f"{done:>3}/{len(plan)} {row.name:<20} rate {rate:<8g} loss {figures['eval/loss']:.4f}  "
            f"exact match {figures['eval/exact_match']:.3f}{'  (kept)' if kept else ''}",
            flush=True,
        )
    return {name: min(found, key=lambda figures: figures["eval/loss"]) for name, found in tried.items()}


def train_base(config: TrainTableConfig) -> str:
    """Trains the model that rows start from, where that is asked for and not done; returns its folder or name."""
    from experiments.training import run_training

    if config.start is None:
        return config.run.model
    folder = config.folder / BASE
    base = dataclasses.replace(config.start, steps=config.size.base_steps, run_dir=folder)
    if not (folder / "model").is_dir():
        print(f"training the model that all rows start from, {base.steps} updates", flush=True)
        run_training(base)
    return str(folder / "model")


def run_cell(folder: Path, row: TrainRow, rate: float, shared: TrainConfig) -> tuple[Figures, bool]:
    """Returns (the figures of one run, whether they were kept from before)."""
    from experiments.training import run_training

    run = dataclasses.replace(
        shared,
        adapter=row.adapter,
        objective=row.objective,
        optimizer=dataclasses.replace(shared.optimizer, learning_rate=rate),
        run_dir=folder / "runs" / f"{row.name}-{rate:g}",
    )
    path, key = run.run_dir / "figures.json", cell_key(dump_config(run))
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["figures"], True
    if run.run_dir.is_dir() and (path.is_file() or _other_settings(run)):
        shutil.rmtree(run.run_dir)
    figures = run_training(run) | {"learning_rate": rate}
    path.write_text(json.dumps({"key": key, "figures": figures}), encoding="utf-8")
    shutil.rmtree(run.run_dir / "checkpoints")
    return figures, False


def _other_settings(run: TrainConfig) -> bool:
    """Whether a run's folder was left by a run with other settings."""
    saved = run.run_dir / "config.yaml"
    return not saved.is_file() or saved.read_text(encoding="utf-8") != dump_config(run)
