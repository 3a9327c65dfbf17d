"""Dolphin's table (2408.15518): what a request costs with a context whole and compressed, and what memory retains.

Costs by formula (`experiments.reading_costs`) at every length, seconds measured where the preset says so; then the
stages of training one after another, each from the file of the one before, with the held-out loss beside that of the
untouched main decoder behind no context, the first N tokens of it, and all of it. What is finished is kept.
"""

import dataclasses
import shutil
from typing import Any, Literal, NamedTuple

from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.resuming import other_settings
from experiments.table_config import TableFrame
from experiments.train_config import TrainConfig
from experiments.train_dolphin import FILE, DolphinTraining
from finetune.data import FactsData
from models.scratch import ScratchConfig

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class DolphinClaim:
    """A sentence of the paper: `row`'s `measure` is above `factor` times `than`'s, or below it."""

    text: str = ""
    row: str = ""
    than: str = ""
    measure: str = "loss"
    factor: float = 1.0
    below: bool = False


@dataclasses.dataclass(frozen=True)
class DolphinPreset:
    """How much is measured."""

    measured: tuple[int, ...] = (1024,)  # tokens of contexts whose requests are timed
    repeats: int = 3  # of each, in turn
    stages: tuple[str, ...] = ("restoration",)  # of training, in their order
    steps: int = 200  # updates of each
    examples: int = 16  # held-out questions that are answered
    scratch: ScratchConfig | None = None  # both decoders are new ones of this shape, in place of the real ones

    def __post_init__(self) -> None:
        if min(self.repeats, self.steps) < 1 or self.examples < 0:
            raise ValueError("repeats and steps must be at least 1, examples at least 0")


@dataclasses.dataclass(frozen=True)
class DolphinPresets:
    """The sizes that a table can be run at."""

    smoke: DolphinPreset = DolphinPreset((64,), 1, ("restoration",), 2, 2, ScratchConfig(2, 32, 2, 1, 48))
    cpu: DolphinPreset = DolphinPreset()
    gpu: DolphinPreset = DolphinPreset((1024, 4096, 16384), 5, ("restoration", "continual", "instruction"), 4000, 200)


@dataclasses.dataclass(frozen=True)
class DolphinTableConfig(TableFrame):
    """The table."""

    type: Literal["dolphin"] = "dolphin"
    table: str = "dolphin"
    run: TrainConfig = TrainConfig(dolphin=DolphinTraining(), data=FactsData(), packing=False)  # what stages share
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)  # tokens of contexts whose cost is computed
    question: int = 32  # tokens
    answer: int = 64  # tokens
    claims: tuple[DolphinClaim, ...] = ()
    presets: DolphinPresets = DolphinPresets()

    def __post_init__(self) -> None:
        if self.run.dolphin is None or not isinstance(self.run.data, FactsData):
            raise ValueError("run must have a compressor (run.dolphin) and data of type facts")
        if min(self.question, self.answer, *self.lengths) < 1:
            raise ValueError("lengths, question and answer must be at least 1 token")


class Measured(NamedTuple):
    """What the table shows: figures of each length of context, by row; of each stage, by row."""

    costs: dict[int, dict[str, Figures]]
    stages: dict[str, dict[str, Figures]]


def measure(config: DolphinTableConfig) -> Measured:
    """Measures what is missing."""
    run = with_models(config)
    costs = {length: _cost(config, run, length) for length in config.lengths}
    for length in config.size.measured:
        timed = _kept(config, f"seconds-{length}", lambda length=length: seconds(config, run, length), run)
        costs[length] = {row: {**costs.get(length, {}).get(row, {}), "seconds": timed[row]} for row in timed}
    return Measured(costs, _stages(config, run))


def with_models(config: DolphinTableConfig) -> TrainConfig:
    """Returns what all runs share, with new decoders made where the preset wants such."""
    shape = config.size.scratch
    if shape is None:
        return config.run
    import jax

    from models.encoder_decoder import init_params
    from models.scratch import scratch_model
    from models.weights.byte_tokenizer import byte_tokenizer
    from models.weights.orbax import save_model

    made = config.folder / "scratch" / cell_key(dataclasses.asdict(shape))[:12]
    folders = [made / name for name in ("main", "compressor")]
    for seed, folder in enumerate(folders):
        if not folder.is_dir():
            tokenizer = byte_tokenizer()
            model = scratch_model(shape, tokenizer.vocab_size)
            save_model(folder, model, init_params(model, jax.random.key(seed)), tokenizer)
    settings = dataclasses.replace(config.run.dolphin, compressor=str(folders[1]))
    return dataclasses.replace(config.run, model=str(folders[0]), dolphin=settings)


def _kept(config: DolphinTableConfig, name: str, found: Any, run: TrainConfig) -> Figures:
    path, size = config.folder / "runs" / f"{name}.json", config.size
    key = cell_key(dump_config(run), dataclasses.asdict(size), config.question, config.answer)
    kept = read_kept(path, key)
    if kept is None:
        kept = {"figures": found()}
        keep(path, key, **kept)
        print(name, flush=True)
    return kept["figures"]


def _cost(config: DolphinTableConfig, run: TrainConfig, length: int) -> dict[str, Figures]:
    """Returns what a request costs by formula, in the bytes of float32."""
    from experiments.reading_costs import request_cost
    from models.weights.load import read_config

    main, small = read_config(run.model), read_config(run.dolphin.compressor)
    asked = (main, length, config.question, config.answer)
    whole = request_cost(*asked)
    short = request_cost(*asked, compressor=small, memory=run.dolphin.memory)
    return {"full": dict(whole._asdict()), "memory": dict(short._asdict())}


def seconds(config: DolphinTableConfig, run: TrainConfig, length: int) -> Figures:
    """Returns the median seconds of a request whose context has this many tokens, whole and compressed.

    The memory is untrained: what it costs does not depend on that. Contexts are arbitrary ids.
    """
    import statistics

    import jax
    import numpy as np

    from decoding import make_decode_fn
    from experiments.timed import TimedDecode, alternate
    from models.config import DecoderConfig
    from models.dolphin import Dolphin, DolphinConfig, with_memory
    from models.weights.load import load_model

    def wide(model: Any) -> DecoderConfig:  # no limit of a model's is a limit of what can be timed
        return dataclasses.replace(model.config, max_length=max(model.config.max_length, 2 * length + 1024))

    (main, values, _), (small, small_values, _) = map(load_model, (run.model, run.dolphin.compressor))
    pair = Dolphin(DolphinConfig(wide(small), wide(main), run.dolphin.memory))
    params = with_memory(pair, jax.random.key(0), small_values, values)
    rng = np.random.default_rng(0)
    context, prompt = rng.integers(0, small.config.vocab_size, length), rng.integers(0, 200, config.question)
    whole = rng.integers(0, main.config.vocab_size, length + config.question)
    sides = []
    for model, given, asked, told in (
        (pair.writer, values, whole, {}),
        (pair, params, prompt, {"contexts": [context.tolist()]}),
    ):
        decode_fn = make_decode_fn(model, "greedy", max_new_tokens=config.answer)
        timed, inputs = TimedDecode(decode_fn, given), decode_fn.inputs([asked.tolist()], **told)
        sides.append(lambda timed=timed, inputs=inputs: timed(inputs)[1])
    taken = alternate(sides, config.size.repeats)
    both = [statistics.median(one.prefill + one.decode for one in side) for side in taken]
    return dict(zip(("full", "memory"), both, strict=True))


def _stages(config: DolphinTableConfig, run: TrainConfig) -> dict[str, dict[str, Figures]]:
    """Trains the stages that are asked for; returns {stage: {row: figures}}."""
    found: dict[str, dict[str, Figures]] = {}
    start = None
    for stage in config.size.stages:
        asked = dataclasses.replace(
            run,
            dolphin=dataclasses.replace(run.dolphin, start=start),
            data=dataclasses.replace(run.data, stage=stage),
            evaluation=dataclasses.replace(run.evaluation, every=0, examples=config.size.examples),
            steps=config.size.steps,
            run_dir=config.folder / "runs" / stage,
        )
        found[stage] = {"memory": _kept(config, f"stage-{stage}", lambda asked=asked: _trained(asked), asked)}
        for row in ("no context", "first tokens", "full"):
            name = f"{stage}-{row.replace(' ', '_')}"
            made = _kept(config, name, lambda asked=asked, row=row: untouched_loss(asked, row), asked)
            found[stage][row] = made
        start = asked.run_dir / FILE
    return found


def _trained(run: TrainConfig) -> Figures:
    from experiments.training import run_training

    if run.run_dir.is_dir() and other_settings(run):
        shutil.rmtree(run.run_dir)
    figures = run_training(run)
    names = {"eval/loss": "loss", "eval/exact_match": "exact match", "perf/step_seconds": "seconds of an update"}
    return {short: figures[name] for name, short in names.items() if name in figures}


def untouched_loss(run: TrainConfig, what: str) -> Figures:
    """Returns the main decoder's held-out loss behind no context, its first tokens (as many as the memory's) or all."""
    import jax

    from finetune.data import fact_examples
    from finetune.objectives import cross_entropy
    from finetune.packing import Batches
    from finetune.rows import Row, encode, stack
    from finetune.trainer import summed_loss
    from models.weights.load import load_model

    model, params, tokenizer = load_model(run.model, run.dtype)
    rows = []
    count = run.batch_size * run.evaluation.batches
    for example in fact_examples(run.data.stage, run.data.test_size, run.data.facts, run.data.seed, True)[:count]:
        told = tokenizer.encode(example.context)
        told = {"no context": [], "first tokens": told[: run.dolphin.memory], "full": told}[what]
        row = encode(tokenizer, example)
        rows.append(Row([*told, *row.tokens], [False] * len(told) + row.targets))
    length = max(len(row.tokens) for row in rows)
    batches = Batches(stack(rows), batch_size=run.batch_size, length=length, packing=False)
    loss = jax.jit(lambda params, batch: summed_loss(model, cross_entropy(), params, None, batch))
    total = tokens = 0.0
    for step in range(len(batches)):
        value, figures = loss(params, jax.tree.map(lambda x: x[0], batches(step)))
        total, tokens = total + float(value), tokens + float(figures["tokens"])
    return {"loss": total / tokens}
