"""MoE-X's table (2503.07639): mixtures of experts and dense MLPs, with as many parameters at work on a token, trained
from scratch; their loss, how few of their neurons are at work, and how well single neurons stand for what is known.

Every row is trained twice: on games of Othello, where what is on the board is known behind every move, and on stories,
where the state of the law that writes them is. Everything that is finished is kept.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import train_table
from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.table_config import TableFrame
from experiments.train_config import TrainConfig, check_shared
from experiments.train_table import HELD_OUT, Figures, TrainClaim, TrainRow
from finetune.data_configs import OthelloData, StoriesData
from models.config import Activation
from models.growth import GrowthConfig
from models.scratch import ExpertsConfig, ScratchConfig

PARTS = ("board", "text")
Part = Literal["board", "text"]
_PLAIN = ScratchConfig(gated=False)


@dataclasses.dataclass(frozen=True)
class MoeXRow:
    """A kind of feed-forward layer, and how a model of it comes to be."""

    name: str = "dense"
    activation: Activation = "gelu"
    experts: ExpertsConfig | None = None  # in place of the MLP, half as wide each where two are active
    start: str = ""  # the row before this one whose trained model it starts from; "": a new model
    trained: bool = True  # false: a new model as it is, the control of what width alone gives
    paper: str = ""  # what the paper reports, in words and figures


@dataclasses.dataclass(frozen=True)
class MoeXPreset:
    """How much is trained and measured."""

    board: int = 100  # updates on games
    text: int = 100  # updates on stories
    games: int = 20_000  # to train on
    turns: int | None = None  # of a game, at most; None: whole games
    texts: int = 20  # held-out texts that neurons are chosen on, and as many that they are tested on
    per_decile: int = 10  # tokens of each tenth of a feature's strengths, of which its explanation is asked
    rows: tuple[str, ...] = ()  # which; none: all
    seeds: int = 1  # runs of each row

    def __post_init__(self) -> None:
        if min(self.board, self.text, self.games, self.texts, self.per_decile, self.seeds) < 1:
            raise ValueError("board, text, games, texts, per_decile and seeds must be at least 1")


@dataclasses.dataclass(frozen=True)
class MoeXPresets:
    """The sizes that the table can be run at."""

    smoke: MoeXPreset = MoeXPreset(2, 2, 100, 9, 4, 1)
    cpu: MoeXPreset = MoeXPreset()
    gpu: MoeXPreset = MoeXPreset(5000, 5000, texts=500, seeds=3)


@dataclasses.dataclass(frozen=True)
class MoeXTableConfig(TableFrame):
    """MoE-X's table."""

    type: Literal["moe_x"] = "moe_x"
    table: str = "moe_x"
    # What all rows share; activation and experts of the shape are the row's, and what the preset says is the preset's.
    board: TrainConfig = TrainConfig(scratch=_PLAIN, adapter=None, data=OthelloData())
    text: TrainConfig = TrainConfig(scratch=_PLAIN, adapter=None, data=StoriesData())
    rows: tuple[MoeXRow, ...] = (MoeXRow(),)
    layer: int = 0  # whose neurons are measured
    claims: tuple[TrainClaim, ...] = ()
    presets: MoeXPresets = MoeXPresets()

    def __post_init__(self) -> None:
        _check_parts(self)
        names = [row.name for row in self.rows]
        self.check_rows(names)
        for number, row in enumerate(self.rows):
            if row.start and (row.start not in names[:number] or not row.trained):
                raise ValueError(f"row {row.name!r} must start from a row before it, and be trained")
            for part in PARTS:
                _shape(self, part, row)
        self.check_presets(names)
        self.check_claims(names)

    @property
    def chosen(self) -> tuple[MoeXRow, ...]:
        """The rows that are run, with those that they start from."""
        by_name = {row.name: row for row in self.rows}
        wanted = set(self.size.rows) or set(by_name)
        for row in reversed(self.rows):
            wanted |= {row.start} if row.name in wanted else set()
        return tuple(row for row in self.rows if row.name in wanted)

    def data(self, part: Part) -> OthelloData | StoriesData:
        """Returns what a part is trained on at this preset."""
        data = getattr(self, part).data
        if isinstance(data, StoriesData):
            return data
        return dataclasses.replace(data, size=self.size.games, turns=self.size.turns)


def _check_parts(config: MoeXTableConfig) -> None:
    for part, data in (("board", OthelloData), ("text", StoriesData)):
        run = getattr(config, part)
        check_shared(part, run)
        if not isinstance(run.data, data) or run.scratch is None or run.scratch.gated:
            kind = data.__dataclass_fields__["type"].default
            raise ValueError(f"{part}.data must be of type {kind}, and {part}.scratch a new model, not gated")
        if not run.evaluation.batches:
            raise ValueError(f"{part}.evaluation.batches must be at least 1: the held-out loss is a figure here")
        if not 0 <= config.layer < run.scratch.layers:
            raise ValueError(f"layer must be one of the model's, 0 to {run.scratch.layers - 1}, got {config.layer}")


def _shape(config: MoeXTableConfig, part: Part, row: MoeXRow) -> ScratchConfig:
    """Returns the shape of a row's model."""
    return dataclasses.replace(getattr(config, part).scratch, activation=row.activation, experts=row.experts)


def measure(config: MoeXTableConfig) -> dict[str, Figures]:
    """Returns {row: figures by "board/NAME" and "text/NAME"}, running what is not yet kept."""
    found: dict[str, Figures] = {row.name: {} for row in config.chosen}
    for part in PARTS:
        probe = functools.cache(functools.partial(_read_probe, config, part))
        for row in config.chosen:
            runs = [_measured(config, part, row, seed, probe) for seed in range(config.size.seeds)]
            figures = train_table.averaged(runs)
            found[row.name] |= {f"{part}/{name}": value for name, value in figures.items()}
            loss = f"loss {figures[HELD_OUT]:.4f}  " if HELD_OUT in figures else ""
            told = figures.get("reconstruction", 0.0)
            print(f"{part:<6} {row.name:<28} {loss}reconstruction {told:.3f}", flush=True)
    return found


def _run(config: MoeXTableConfig, part: Part, row: MoeXRow, seed: int) -> tuple[Path, TrainConfig]:
    """Returns the config of a row's run, and the folder that it lies in.

    A row that starts from another lies in a folder named by that one's settings, so that it never outlives these.
    """
    shared, folder = getattr(config, part), config.folder / part
    evaluation = dataclasses.replace(shared.evaluation, every=0, examples=0)
    steps = getattr(config.size, part)
    run = dataclasses.replace(shared, adapter=None, data=config.data(part), steps=steps, evaluation=evaluation)
    growth = None
    if row.start:
        start = next(other for other in config.rows if other.name == row.start)
        _, before = _run(config, part, start, seed)
        folder = folder / f"from-{cell_key(dump_config(before))[:12]}"
        # A start that is a mixture already, or is to stay dense, is only trained on.
        growth = GrowthConfig(experts=row.experts) if row.experts != start.experts else None
        run = dataclasses.replace(run, scratch=None, model=str(before.run_dir / "model"))
    else:
        run = dataclasses.replace(run, scratch=_shape(config, part, row))
    rate = run.optimizer.learning_rate
    return folder, train_table.cell_config(folder, TrainRow(row.name, growth=growth), rate, seed, run)


def _measured(config: MoeXTableConfig, part: Part, row: MoeXRow, seed: int, probe: Any) -> Figures:
    """Returns the figures of one run of a row: those of training, and those of its neurons."""
    folder, run = _run(config, part, row, seed)
    figures: Figures = {}
    if row.trained:
        trained, _ = train_table.run_cell(
            folder, TrainRow(row.name, growth=run.growth), run.optimizer.learning_rate, seed, run
        )
        figures = {name: trained[name] for name in (HELD_OUT, "perf/step_seconds") if name in trained}
        if not np.isfinite(figures[HELD_OUT]):
            return figures
    path, size = run.run_dir.parent / f"{run.run_dir.name}.neurons.json", config.size
    key = cell_key(dump_config(run), str(folder), row.trained, config.layer, size.texts, size.per_decile)
    kept = read_kept(path, key)
    if kept is None:
        kept = {"figures": _neurons(config, part, _model(run, row), probe())}
        keep(path, key, **kept)
    return figures | kept["figures"]


class Probe(NamedTuple):
    """Held-out texts, the first half for choosing neurons, the second for testing them.

    Attributes:
        tokens: of each text.
        train: bool[N, P], what holds behind each token of the first half but a text's first.
        test: the same of the second half.
        state: the properties that are what a model has to keep in mind, all but the words themselves.
        floor: minus the log-probability of a token, in nats, under the law that wrote the texts: no loss is below it.
    """

    tokens: list[list[int]]
    train: np.ndarray
    test: np.ndarray
    state: slice
    floor: float


def _read_probe(config: MoeXTableConfig, part: Part) -> Probe:
    """Returns the texts of a part."""
    from experiments.scratch_tokenizers import scratch_tokenizer
    from finetune import othello, stories

    data, half = config.data(part), config.size.texts
    tokenizer = scratch_tokenizer(getattr(config, part).scratch.tokenizer)
    if isinstance(data, OthelloData):
        texts = [text.split() for text in othello.games(2 * half, data.seed, True, data.turns)]
        held = [othello.board_properties(text)[1:] for text in texts]
        surprise, state = [othello.surprise(text) for text in texts], slice(None)
    else:
        texts = [text.split() for text in stories.stories(2 * half, data.words, data.domains, data.seed, True)]
        domains = [data.domains[number % len(data.domains)] for number in range(2 * half)]
        held = [stories.story_properties(*told)[1:] for told in zip(texts, domains, strict=True)]
        surprise = [-np.array(list(stories.read(*told))[1:]) for told in zip(texts, domains, strict=True)]
        state = slice(len(stories.vocabulary()), None)
    tokens = [tokenizer.encode(" ".join(text)) for text in texts]
    floor = float(np.concatenate(surprise).mean())
    return Probe(tokens, np.concatenate(held[:half]), np.concatenate(held[half:]), state, floor)


def _model(run: TrainConfig, row: MoeXRow) -> tuple[Any, Any]:
    """Returns the network and parameters of a run that is over, or of one that is not to be trained."""
    from models.weights.load import load_model

    if row.trained:
        return load_model(str(run.run_dir / "model"))[:2]
    from experiments.base_model import load_base
    from models.sharding import make_mesh

    base = load_base(run, make_mesh(run.mesh))
    return base.model, base.params


def _neurons(config: MoeXTableConfig, part: Part, model: tuple[Any, Any], probe: Probe) -> Figures:
    """Returns the figures of the neurons of a layer."""
    from finetune.interpretability import coverage, detection, hidden_codes, reconstruction, sparsity

    network, params = model
    codes = hidden_codes(network, params, probe.tokens, config.layer, first=1)
    mixture = network.config.blocks[config.layer].mlp
    figures = sparsity(codes, getattr(mixture, "top_k", 0)) | _sizes(network.config, params)
    cut, rng = len(probe.train), np.random.default_rng(0)
    train, test = codes.features[:cut], codes.features[cut:]
    held, held_test = probe.train[:, probe.state], probe.test[:, probe.state]
    found = reconstruction((train, held), (test, held_test), kinds=2 if part == "board" else 1)
    figures |= {
        "floor": probe.floor,
        "coverage": coverage(train, held).value,
        "coverage_shuffled": coverage(train, rng.permutation(held)).value,
        "reconstruction": found.f1,
    }
    if found.conflicts is not None:
        return figures | {"conflicts": found.conflicts}
    ask = functools.partial(detection, (train, probe.train), per_decile=config.size.per_decile)
    asked, control = ask((test, probe.test)), ask((test, rng.permutation(probe.test)))
    return figures | {
        "detection": asked.accuracy,
        "detection/error": asked.error,
        "detection_shuffled": control.accuracy,
        "asked": float(asked.features),
    }


def _sizes(config: Any, params: Any) -> Figures:
    """Returns how many parameters a model has, and how many of them are at work on a token."""
    import jax

    whole = idle = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(part, "key", part)) for part in path]
        whole += leaf.size
        if names[-1].startswith("experts_"):
            mixture = config.blocks[int(names[0].removeprefix("layers_"))].mlp
            idle += leaf.size * (1 - mixture.top_k / mixture.num_experts)
    return {"parameters": whole, "active": whole - idle}
