"""Return of the Encoder's table (2501.16273): what an encoder is worth at equal parameters, with and without a teacher.

Rows are shapes of equal parameters: a decoder-only model, and encoder-decoders that read with more or less of their
layers. Each is trained on questions with long texts and short answers (`finetune.records`), some learn from a larger
decoder-only teacher; and of new models of a larger shape the time to the first token, the speed and the cache are
measured against the length of what is read. Everything that is finished is kept.
"""

import dataclasses
import functools
import statistics
from typing import Any, Literal

import numpy as np

from experiments import train_table
from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.runtime import machine
from experiments.table_config import TableFrame
from experiments.train_config import TrainConfig, check_shared
from experiments.train_table import Figures, TrainClaim, TrainRow
from finetune.data_configs import RecordsData
from finetune.distillation import DistillationConfig
from finetune.objective_configs import CrossEntropyConfig
from models.return_of_the_encoder import matched, num_parameters, split
from models.scratch import ScratchConfig, scratch_model

TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class RoeRow:
    """A way to deal out layers, and whether a teacher helps."""

    name: str = "decoder-only"
    reads: float = 0.0  # share of the layers that read; 0: a decoder-only model
    taught: bool = False  # whether it learns from the teacher, beside the labels
    samples: bool = False  # whether what it is taught on is what it writes itself
    paper: str = ""  # what the paper reports, in words and figures


@dataclasses.dataclass(frozen=True)
class RoePreset:
    """How much is trained and measured."""

    steps: int = 100  # updates of each row
    teacher_steps: int = 100
    examples: int = 100  # questions that are answered
    lengths: tuple[int, ...] = (64, 256, 1024)  # tokens that are read, where time is measured
    new_tokens: int = 32  # that are written then
    repeats: int = 5  # of each measurement, of which the median counts
    rows: tuple[str, ...] = ()  # which; none: all
    seeds: int = 1  # runs of each row

    def __post_init__(self) -> None:
        counts = (self.steps, self.teacher_steps, self.examples, self.repeats, self.seeds, *self.lengths)
        if min(counts) < 1 or not self.lengths or self.new_tokens < 2:
            raise ValueError("every count of a preset must be at least 1, new_tokens 2, and lengths not empty")


@dataclasses.dataclass(frozen=True)
class RoePresets:
    """The sizes that the table can be run at."""

    smoke: RoePreset = RoePreset(2, 2, 2, (16,), 2, 1)
    cpu: RoePreset = RoePreset()
    gpu: RoePreset = RoePreset(5000, 5000, 1000, (256, 1024, 4096), 64, 20, (), 3)


_SHAPE = ScratchConfig(layers=2, encoder_layers=4, tokenizer="stories")


@dataclasses.dataclass(frozen=True)
class RoeTableConfig(TableFrame):
    """Return of the Encoder's table."""

    type: Literal["return_of_the_encoder"] = "return_of_the_encoder"
    table: str = "return_of_the_encoder"
    # What the runs of all rows share; rows have as many parameters as its shape, whose layers they deal out anew.
    run: TrainConfig = TrainConfig(scratch=_SHAPE, adapter=None, data=RecordsData(), packing=False)
    teacher: ScratchConfig = ScratchConfig(tokenizer="stories")  # decoder-only, of the same tokenizer
    label_share: float = 0.1  # weight of the labels beside a teacher
    latency: ScratchConfig = ScratchConfig(
        encoder_layers=12, max_length=8192
    )  # the shape whose speed is measured, dealt out likewise
    rows: tuple[RoeRow, ...] = (RoeRow(),)
    claims: tuple[TrainClaim, ...] = ()
    presets: RoePresets = RoePresets()

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        self.check_rows(names, reserved=(TEACHER,))
        check_shared("run", self.run)
        if self.run.scratch is None or self.run.packing:
            raise ValueError("run.scratch must be a shape, and run.packing false")
        if self.teacher.encoder_layers or self.teacher.tokenizer != self.run.scratch.tokenizer:
            raise ValueError("the teacher must be decoder-only (encoder_layers 0), of the tokenizer of run.scratch")
        self.check_presets(names)
        if max(self.size.lengths) + self.size.new_tokens > self.latency.max_length:
            raise ValueError(f"latency.max_length {self.latency.max_length} is less than is read and written")
        for row in self.rows:
            if row.samples and not (row.taught and row.reads):
                raise ValueError(f"row {row.name!r} is taught on samples: it must be taught, and have layers that read")
            split(self.run.scratch, row.reads), split(self.latency, row.reads)
        self.check_claims(names)


def measure(config: RoeTableConfig) -> dict[str, Figures]:
    """Returns {row: figures}, running what is not yet kept."""
    found = {row.name: _trained(config, row) for row in config.chosen}
    speeds = _speeds(config)
    return {row.name: found[row.name] | speeds[row.reads] for row in config.chosen}


def shaped(shape: ScratchConfig, reads: float) -> ScratchConfig:
    """Returns the shape that a row has: layers dealt out anew, and as many parameters as before."""
    from experiments.scratch_tokenizers import scratch_tokenizer

    return matched(split(shape, reads), shape, scratch_tokenizer(shape.tokenizer).vocab_size)


def row_run(config: RoeTableConfig, shape: ScratchConfig, steps: int) -> TrainConfig:
    """Returns the run of a shape; a decoder-only model reads a source in its row, so that rows are longer by it."""
    run = config.run
    evaluation = dataclasses.replace(run.evaluation, every=0, examples=config.size.examples)
    run = dataclasses.replace(run, scratch=shape, steps=steps, evaluation=evaluation)
    if shape.encoder_layers:
        return run
    return dataclasses.replace(run, length=run.length + (run.source_length or run.length), source_length=None)


def _trained(config: RoeTableConfig, row: RoeRow) -> Figures:
    """Returns the figures of a row's training, the mean of its seeds."""
    rate, objective = config.run.optimizer.learning_rate, CrossEntropyConfig()
    if row.taught:
        objective = DistillationConfig(_teacher(config), label_share=config.label_share, on_samples=row.samples)
    run = row_run(config, shaped(config.run.scratch, row.reads), config.size.steps)
    cell = TrainRow(row.name, adapter=None, objective=objective)
    runs = [train_table.run_cell(config.folder, cell, rate, seed, run)[0] for seed in range(config.size.seeds)]
    figures = train_table.averaged(runs)
    wanted = ("eval/", "size/trainable", "perf/step_seconds")
    shown = {name: value for name, value in figures.items() if name.startswith(wanted)}
    print(f"{row.name:<28} loss {figures[train_table.HELD_OUT]:.4f}", flush=True)
    return shown


def _teacher(config: RoeTableConfig) -> str:
    """Trains the teacher where that is not done; returns its folder, whose name says how it was trained."""
    rate = config.run.optimizer.learning_rate
    run = row_run(config, config.teacher, config.size.teacher_steps)
    cell = TrainRow(f"{TEACHER}-{cell_key(dump_config(run))[:8]}", adapter=None)
    train_table.run_cell(config.folder, cell, rate, 0, run)
    return str(train_table.cell_config(config.folder, cell, rate, 0, run).run_dir / "model")


def _speeds(config: RoeTableConfig) -> dict[float, Figures]:
    """Returns {share of reading layers: time, speed and cache by the length of what is read}, shapes in turn."""
    shapes = {row.reads: shaped(config.latency, row.reads) for row in config.chosen}
    size = config.size
    key = cell_key([dataclasses.asdict(shape) for shape in shapes.values()], size.lengths, size.new_tokens)
    path = config.folder / "speeds.json"
    kept = read_kept(path, cell_key(key, size.repeats, machine()))
    if kept is None:
        kept = {"figures": _measure_speeds(list(shapes.values()), size)}
        keep(path, cell_key(key, size.repeats, machine()), **kept)
    return dict(zip(shapes, kept["figures"], strict=True))


def _measure_speeds(shapes: list[ScratchConfig], size: RoePreset) -> list[Figures]:
    import jax

    from experiments.scratch_tokenizers import scratch_tokenizer
    from experiments.timed import alternate
    from models.encoder_decoder import init_params

    found: list[Figures] = []
    sides = []
    for shape in shapes:
        model = scratch_model(shape, scratch_tokenizer(shape.tokenizer).vocab_size)
        found.append({"parameters": num_parameters(model)})
        sides.append((model, jax.jit(functools.partial(init_params, model))(jax.random.key(0))))
    for length in size.lengths:
        prompt = np.random.default_rng(0).integers(1, 100, length).tolist()
        runs = [(_timed(*side, 1), _timed(*side, size.new_tokens)) for side in sides]
        calls = [functools.partial(_call, first, more, prompt) for first, more in runs]
        for figures, kept in zip(found, alternate(calls, size.repeats), strict=True):
            first, more, held = (statistics.median(values) for values in zip(*kept, strict=True))
            figures |= {
                f"first_token/{length}": first,
                f"tokens_per_second/{length}": size.new_tokens / more,
                f"next_token/{length}": (more - first) / (size.new_tokens - 1),
                f"cache/{length}": held,
            }
        print(f"speed with {length} tokens to read: measured", flush=True)
    return found


def _timed(model: Any, params: Any, new_tokens: int) -> Any:
    from decoding import make_decode_fn
    from experiments.timed import TimedDecode

    return TimedDecode(make_decode_fn(model, "greedy", max_new_tokens=new_tokens), params)


def _call(first: Any, more: Any, prompt: list[int]) -> tuple[float, float, float]:
    """Returns the seconds to the first token, those to the last one, and the bytes of the cache."""
    import jax

    _, one = first(first.decode_fn.inputs([prompt]))
    state, all_of_them = more(more.decode_fn.inputs([prompt]))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    return one.prefill + one.decode, all_of_them.prefill + all_of_them.decode, float(held)
