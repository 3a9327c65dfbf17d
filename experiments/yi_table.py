"""Yi's table (2403.04652): a deeper model from a trained one, a longer context, and what the data cascade keeps.

Two tables of training runs (`experiments.train_table`), of which every row is also measured before it is trained, as
the row "NAME at first"; facts asked for from longer and longer texts; and the cascade on a corpus whose faults are
known. Everything that is finished is kept.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments import train_table
from experiments.cascade import Counts
from experiments.clean_corpus import CleanConfig, clean
from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.table_config import TableFrame
from experiments.train_config import TrainConfig
from experiments.train_table import Figures, TrainClaim, TrainTableConfig
from finetune.cleaning.planted import FAULTS, planted_corpus
from models.weights.whole import whole_folder

FIRST = " at first"  # behind the name of a row: before it is trained
_SHARDS = 3
_BATCH = 25  # texts that are read at once


@dataclasses.dataclass(frozen=True)
class RecallGrid:
    """Texts from which one fact is asked for."""

    words: tuple[int, ...] = (64, 128, 256, 512)  # of a text
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the fact stands: 0 at the beginning, 1 at the end
    facts: int = 8  # of a text

    def __post_init__(self) -> None:
        if not self.words or not self.depths or min(self.words) < 2 * self.facts:
            raise ValueError("words and depths must name at least one each, and words twice the facts")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError("depths must be 0 to 1")


@dataclasses.dataclass(frozen=True)
class CascadeSizes:
    """Texts of the corpus with planted faults, by preset."""

    smoke: int = 60
    cpu: int = 100
    gpu: int = 100


@dataclasses.dataclass(frozen=True)
class YiTableConfig(TableFrame):
    """Yi's table. What `depth` and `context` say of preset and out is not read: those of the whole hold."""

    type: Literal["yi"] = "yi"
    table: str = "yi"
    depth: TrainTableConfig = TrainTableConfig()  # deeper models
    context: TrainTableConfig = TrainTableConfig()  # longer contexts
    recall: RecallGrid = RecallGrid()
    cascade: CleanConfig = CleanConfig()  # source, out and reference are those of the table
    texts: CascadeSizes = CascadeSizes()
    claims: tuple[TrainClaim, ...] = ()

    def __post_init__(self) -> None:
        rows = [row.name for part in (self.depth, self.context) for row in part.rows]
        names = {*rows, *(name + FIRST for name in rows)}
        self.check_claims(sorted(names))

    def part(self, name: Literal["depth", "context"]) -> TrainTableConfig:
        """Returns the table of a part, at the preset and in the folder of the whole."""
        return dataclasses.replace(getattr(self, name), preset=self.preset, out=self.folder / name)


class Measured(NamedTuple):
    """What the table shows: figures of rows by name, cosines of the base's layers, counts of stages and of faults."""

    depth: dict[str, Figures]
    context: dict[str, Figures]
    cosines: list[float]
    counts: list[Counts]
    faults: dict[str, list[int]]  # texts of each kind: before the cascade, and behind each stage


def measure(config: YiTableConfig) -> Measured:
    """Measures what is missing."""
    deeper, longer = config.part("depth"), config.part("context")
    cascade = run_cascade(config)  # first: what is wrong about it shows before anything is trained
    depth = _with_starts(deeper)
    cosines = _cosines(deeper)
    context = _with_starts(longer)
    for name, figures in context.items():
        figures |= _recalled(config, longer, name, figures)
    return Measured(depth, context, cosines, *cascade)


def _with_starts(config: TrainTableConfig) -> dict[str, Figures]:
    """Returns {row: figures, "row at first": figures}, the rows of a part before and after training."""
    trained, _ = train_table.measure(config)
    found: dict[str, Figures] = {}
    for row in config.chosen:
        run = _run(config, row.name, trained[row.name]["learning_rate"])
        path = config.folder / "starts" / f"{row.name}.json"
        key = _key(config, run)
        kept = read_kept(path, key)
        if kept is None:
            kept = {"figures": _start(run)}
            keep(path, key, **kept)
            print(f"{row.name}{FIRST}", flush=True)
        found |= {row.name + FIRST: dict(kept["figures"]), row.name: dict(trained[row.name])}
    return found


def _run(config: TrainTableConfig, row: str, rate: float) -> TrainConfig:
    """Returns the config of a row's first run."""
    base = str(config.folder / train_table.BASE / "model") if config.start is not None else config.run.model
    shared = train_table.shared_run(config, base)
    return train_table.cell_config(config.folder, {r.name: r for r in config.rows}[row], rate, 0, shared)


def _key(config: TrainTableConfig, run: TrainConfig, *more: Any) -> str:
    """Returns what figures of a run hang on: its settings, and those of the model that it starts from."""
    start = None if config.start is None else dump_config(config.start)
    return cell_key(dump_config(run), start, config.size.base_steps, *more)


def _start(run: TrainConfig) -> Figures:
    """Returns a run's held-out figures before its first update, but for answers to questions."""
    from experiments.prepared_run import prepare
    from experiments.train_report import Evaluator

    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, examples=0))
    ready = prepare(run, None)
    figures = Evaluator(run.evaluation, ready)(ready.state.trainable)
    return train_table.with_held_out(figures)


def _cosines(config: TrainTableConfig) -> list[float]:
    """Returns how alike each layer of the base leaves what enters it, on held-out texts."""
    import jax.numpy as jnp

    from finetune.data import read_data
    from models.growth import layer_cosines
    from models.weights.load import load_model

    run = _run(config, config.rows[0].name, 0.0)
    path, key = config.folder / "cosines.json", _key(config, run)
    kept = read_kept(path, key)
    if kept is None:
        model, params, tokenizer = load_model(run.model)
        stream = read_data(run.data, tokenizer, run.length).test.tokens
        texts = stream[: len(stream) // run.length * run.length].reshape(-1, run.length)[:32]
        kept = {"cosines": [float(value) for value in layer_cosines(model, params, jnp.asarray(texts))]}
        keep(path, key, **kept)
    return kept["cosines"]


def _recalled(config: YiTableConfig, part: TrainTableConfig, name: str, figures: Figures) -> Figures:
    """Returns {"recall/WORDS": share of facts that a row names from texts of so many words, and its error}."""
    row = name.removesuffix(FIRST)
    rate = figures.get("learning_rate", {r.name: r for r in part.rows}[row].learning_rates[0])
    run, examples = _run(part, row, rate), part.size.examples
    path = part.folder / "recall" / f"{name.replace(' ', '_')}.json"
    key = _key(part, run, dataclasses.asdict(config.recall), examples)
    kept = read_kept(path, key)
    if kept is None:
        kept = {"figures": recall_shares(config.recall, examples, *_model(run, name.endswith(FIRST)))}
        keep(path, key, **kept)
        print(f"recall, {name}", flush=True)
    return kept["figures"]


def _model(run: TrainConfig, is_first: bool) -> Any:
    """Returns the model of a row before it is trained, or after."""
    from models.growth import GrowthConfig, grow
    from models.weights.load import load_model

    if not is_first:
        return load_model(str(run.run_dir / "model"))
    model, params, tokenizer = load_model(run.model)
    return *grow(model, params, run.growth or GrowthConfig()), tokenizer


def recall_shares(grid: RecallGrid, examples: int, model: Any, params: Any, tokenizer: Any) -> Figures:
    """Returns the share of facts that a model names right, for each number of words and, in it, each depth.

    Args:
        grid: lengths and depths.
        examples: texts of each length, spread over the depths.
        model: the network; it may be asked for more words than it was made for.
        params: its parameters.
        tokenizer: of words.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from finetune.recall import recall_example

    @jax.jit
    def answers(params, tokens):
        return jnp.argmax(model.apply({"params": params}, tokens).logits[:, -1], -1)

    figures: Figures = {}
    each = -(-examples // len(grid.depths))
    for words in grid.words:
        made = [
            recall_example(random.Random(f"grid {words} {depth} {number}"), words, grid.facts, depth)
            for depth in grid.depths
            for number in range(each)
        ]
        prompts = np.asarray([tokenizer.encode(example.prompt) for example in made], np.int32)
        wanted = np.asarray([tokenizer.encode(example.completion)[0] for example in made])
        given = [np.asarray(answers(params, prompts[i : i + _BATCH])) for i in range(0, len(made), _BATCH)]
        right = (np.concatenate(given) == wanted).reshape(len(grid.depths), each)
        share = float(right.mean())
        figures |= {f"recall/{words}": share, f"recall/{words}/error": (share * (1 - share) / right.size) ** 0.5}
        figures |= {
            f"recall/{words}/at {depth:g}": float(row.mean()) for depth, row in zip(grid.depths, right, strict=True)
        }
    return figures


def run_cascade(config: YiTableConfig) -> tuple[list[Counts], dict[str, list[int]]]:
    """Plants a corpus and cleans it; returns the counts of stages, and of the texts of each fault that are left."""
    size, folder = getattr(config.texts, config.preset), config.folder / "cascade"
    mark, key = "made-of", cell_key("planted", size)
    if not (folder / "raw" / mark).is_file() or (folder / "raw" / mark).read_text(encoding="utf-8") != key:
        texts, reference = planted_corpus(size, 0)
        with whole_folder(folder / "raw", mark) as staging:
            for shard in range(_SHARDS):
                _write(staging / f"{shard}.jsonl", [one._asdict() for one in texts[shard::_SHARDS]])
            _write(staging / "reference.json", [{"text": text} for text in reference])
            (staging / mark).write_text(key, encoding="utf-8")
    quality = config.cascade.quality
    if quality is not None:
        quality = dataclasses.replace(quality, reference=folder / "raw" / "reference.json")
    counts = clean(dataclasses.replace(config.cascade, source=folder / "raw", out=folder / "clean", quality=quality))
    behind = [folder / "raw", *(folder / "clean" / f"{place}-{one.stage}" for place, one in enumerate(counts, 1))]
    left = [_faults(path) for path in behind]
    return counts, {kind or "none": [faults.count(kind) for faults in left] for kind in ("", *FAULTS)}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _faults(folder: Path) -> list[str]:
    """Returns the fault of each text in a folder's shards."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["fault"] for line in lines]
