"""CodeT5+'s table (2305.07922): what each of its losses is good for, on pairs of texts and functions that code writes.

Every row trains a new model in two stages, on code alone and on pairs, with some of the losses left out, and is then
asked to find functions by their texts, to write them, and to go on with them. Stages that rows share are trained once;
what is finished is kept.
"""

import dataclasses
import shutil
from typing import Any, Literal

from experiments.config import dump_config
from experiments.kept import cell_key, keep, read_kept
from experiments.table_config import TableFrame
from experiments.train_config import TrainConfig
from experiments.train_table import Figures, TrainClaim
from finetune.codet5plus import CodeT5PlusConfig
from finetune.data_configs import CodeData


@dataclasses.dataclass(frozen=True)
class CodeRow:
    """A choice of losses."""

    name: str = "all losses"
    first: tuple[str, ...] | None = None  # losses of the first stage; None: those of the table
    second: tuple[str, ...] | None = None  # of the second
    hard_negatives: bool = True  # whether wrong pairs for matching are drawn by likeness
    paper: str = ""  # what the paper reports, in words and figures


@dataclasses.dataclass(frozen=True)
class CodePreset:
    """How much is trained and asked."""

    first_steps: int = 100  # updates of the first stage
    second_steps: int = 100  # of the second
    pairs: int = 100  # held out, each to be found among all
    answers: int = 50  # of these, functions to be written and gone on with
    rows: tuple[str, ...] = ()  # which; none: all

    def __post_init__(self) -> None:
        if min(self.first_steps, self.second_steps, self.answers) < 1 or self.pairs < 2:
            raise ValueError("first_steps, second_steps and answers must be at least 1, and pairs 2")


@dataclasses.dataclass(frozen=True)
class CodePresets:
    """The sizes that the table can be run at."""

    smoke: CodePreset = CodePreset(2, 2, 8, 4)
    cpu: CodePreset = CodePreset()
    gpu: CodePreset = CodePreset(10_000, 10_000, 500, 200)


@dataclasses.dataclass(frozen=True)
class CodeT5PlusTableConfig(TableFrame):
    """CodeT5+'s table. Updates and folders of both runs are those of the preset."""

    type: Literal["codet5plus"] = "codet5plus"
    table: str = "codet5plus"
    first: TrainConfig = TrainConfig(data=CodeData(), objective=CodeT5PlusConfig())  # of code alone
    second: TrainConfig = TrainConfig(data=CodeData(), objective=CodeT5PlusConfig())  # of pairs, from the first's model
    rows: tuple[CodeRow, ...] = (CodeRow(),)
    top: int = 16  # of the most alike functions the matching head ranks so many again
    new_tokens: int = 80  # of a function that is written
    claims: tuple[TrainClaim, ...] = ()
    presets: CodePresets = CodePresets()

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        self.check_rows(names)
        if not all(isinstance(run.objective, CodeT5PlusConfig) for run in (self.first, self.second)):
            raise ValueError("first.objective and second.objective must be of type codet5plus")
        if not isinstance(self.second.data, CodeData):
            raise ValueError("second.data must be of type code: its held-out pairs are what models are asked for")
        self.check_presets(names)
        self.check_claims(names)
        if self.top < 1 or self.new_tokens < 1:
            raise ValueError("top and new_tokens must be at least 1")


def measure(config: CodeT5PlusTableConfig) -> dict[str, Figures]:
    """Returns {row: figures}, training and asking what is not yet kept."""
    found = {}
    for row in config.chosen:
        first, second = stages(config, row)
        key = cell_key(dump_config(first), dump_config(second), config.size, config.top, config.new_tokens)
        path = config.folder / "rows" / f"{row.name}.json"
        kept = read_kept(path, key)
        if kept is None:
            trained = _trained(first, cell_key(dump_config(first)))
            both = _trained(second, cell_key(dump_config(first), dump_config(second)))
            kept = {"figures": _asked(config, first, second) | {"first/loss": trained, "second/loss": both}}
            keep(path, key, **kept)
        found[row.name] = kept["figures"]
        print(f"{row.name}: MRR {found[row.name]['mrr']:.3f}", flush=True)
    return found


def stages(config: CodeT5PlusTableConfig, row: CodeRow) -> tuple[TrainConfig, TrainConfig]:
    """Returns the configs of a row's two runs; rows that train alike share a folder."""
    first = _with_losses(config.first.objective, row.first, True)
    second = _with_losses(config.second.objective, row.second, row.hard_negatives)
    name = "-".join(first.losses)
    at = config.folder / "first" / name
    way = "" if row.hard_negatives else "-uniform"
    behind = config.folder / "second" / f"{name}--{'-'.join(second.losses)}{way}"
    return (
        dataclasses.replace(config.first, objective=first, steps=config.size.first_steps, run_dir=at),
        dataclasses.replace(
            config.second,
            objective=second,
            steps=config.size.second_steps,
            run_dir=behind,
            model=str(at / "model"),
            scratch=None,
        ),
    )


def _with_losses(objective: Any, losses: tuple[str, ...] | None, is_hard: bool) -> CodeT5PlusConfig:
    return dataclasses.replace(objective, losses=losses or objective.losses, hard_negatives=is_hard)


def _trained(run: TrainConfig, key: str) -> float:
    """Trains a stage where it is not finished; returns its last loss."""
    from experiments.training import run_training

    path = run.run_dir / "figures.json"
    kept = read_kept(path, key)
    if kept is not None:
        return kept["loss"]
    saved = run.run_dir / "config.yaml"
    if path.is_file() or (saved.is_file() and saved.read_text(encoding="utf-8") != dump_config(run)):
        shutil.rmtree(run.run_dir)
    loss = run_training(run)["train/loss"]
    keep(path, key, loss=loss)
    shutil.rmtree(run.run_dir / "checkpoints", ignore_errors=True)
    return loss


def _asked(config: CodeT5PlusTableConfig, first: TrainConfig, second: TrainConfig) -> Figures:
    """Returns what the models of both stages can do on held-out pairs."""
    from finetune import code_measures as measures
    from finetune.data import code_examples
    from finetune.denoising import Specials, special_tokens
    from models.weights.load import load_model

    size = config.size
    examples = code_examples(dataclasses.replace(second.data, test_size=size.pairs), True)
    model, params, tokenizer = load_model(str(second.run_dir / "model"))
    specials: Specials = special_tokens(tokenizer, ("cls", "clm", "match", "code", "end"))
    pairs = measures.held_out(tokenizer, examples, second.source_length or second.length, second.length)
    figures = measures.retrieval(model, params, pairs, specials, config.top)
    figures |= measures.writing(model, params, pairs, specials, size.answers, config.new_tokens)
    behind = measures.completion(model, params, pairs, specials, tokenizer, size.answers, config.new_tokens)
    model, params, _ = load_model(str(first.run_dir / "model"))
    before = measures.completion(model, params, pairs, specials, tokenizer, size.answers, config.new_tokens)
    return figures | before | {f"second/{name}": value for name, value in behind.items()}
