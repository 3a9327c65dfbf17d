"""Tables of methods: every row is a method, every column a task of the questions file; the first row is plain decoding.

Tasks go one after another and all rows of a task one behind the other, so that a slow hour of the machine meets them
all. A cell that is measured is kept and not measured again; an interrupted run goes on where it stopped. Plain decoding
is measured again for a task of which anything else is: every cell keeps what plain decoding took in its own run.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.cells import Cell, Retrieval, load_cell, save_cell
from experiments.corpus import spare_questions, stamp
from experiments.decode_config import SamplingSettings
from experiments.generated import generate
from experiments.kept import cell_key
from experiments.questions import Question, read_questions
from experiments.rows import Rows
from experiments.runtime import forget_programs
from experiments.table_config import TableFrame
from experiments.tables import write_table as write_page
from experiments.train_acceptance_head import ensure_head, head_stamp
from experiments.trained_model import ensure_model, model_stamp
from models.errors import InputError, unknown_name


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row: a method and how it is set."""

    name: str = "plain"
    method: str = "greedy"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the method's own static options
    sampling: SamplingSettings = SamplingSettings()
    draft: bool = False  # drafts with the table's draft model
    retrieval: Retrieval | None = None  # shortens documents; None: they are read whole
    head: Path | None = None  # the draft's acceptance head, or the model's own draft head, for methods that use one
    train: Path | None = None  # the config that trains the head, or the model, where it does not exist yet
    paper: str = ""  # what the paper reports, in words and figures
    # Questions of the file, of those that no cell asks, whose replies by the target an ADED table starts from. Not in
    # the repr, and so in no cell's key: `measure` puts the questions themselves there.
    corpus: int = dataclasses.field(default=0, repr=False)
    # The folder of a model that was trained from the table's and decodes in its place. Not in the repr either: what is
    # in it is in the key.
    model: Path | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.corpus < 0 or (self.corpus and self.method != "aded"):
            raise ValueError(f"row {self.name!r}: corpus is a number of questions, and only for aded")
        if self.model is not None and (self.draft or self.head is not None or self.name == "plain"):
            raise ValueError(f"row {self.name!r}: a row with a model of its own has no draft or head, and is not plain")


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something a paper says that the table can answer: the measure of `row` is above `factor` times that of `than`."""

    text: str = ""
    row: str = ""
    than: str = "plain"
    measure: Literal["mat", "extra", "speedup", "break_even", "correct", "agreement", "acceptance", "by_target"] = "mat"
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is measured."""

    per_task: int = 1  # questions of each task
    max_new_tokens: int = 64  # per turn
    tasks: tuple[str, ...] = ()  # which tasks; none: all of the file's
    rows: tuple[str, ...] = ()  # which rows besides plain; none: all
    document_words: int = 400  # length of generated documents

    def __post_init__(self) -> None:
        if self.per_task < 1 or self.max_new_tokens < 1:
            raise ValueError("per_task and max_new_tokens must be at least 1")
        if self.document_words < 60:
            raise ValueError("document_words must be at least 60")


@dataclasses.dataclass(frozen=True)
class Presets:
    """The sizes that a table can be run at."""

    smoke: Preset = Preset(1, 16)
    cpu: Preset = Preset(2, 64)
    gpu: Preset = Preset(80, 1024)


@dataclasses.dataclass(frozen=True)
class TableConfig(TableFrame):
    """A table."""

    table: str = "spec_bench"
    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    draft: str | None = None  # the model that drafts, for rows that say so
    dtype: Literal["float32", "bfloat16"] | None = None  # None: as stored (GGUF: float32)
    questions: Path = Path("configs/prompts/spec_bench.jsonl")  # a file in Spec-Bench's format, or a name on the hub
    generate: tuple[str, ...] = ()  # tasks that code writes (experiments.generated), in place of the questions' file
    long_prompts: bool = False  # each is read densely once for all rows; each task has caches of its own size
    rows: tuple[TableRow, ...] = (TableRow(),)
    claims: tuple[Claim, ...] = ()
    presets: Presets = Presets()
    seed: int = 0

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        self.check_rows(names)
        if names[0] != "plain":
            raise ValueError(f"the first row must be called plain, got {names[0]!r}")
        if self.long_prompts and any(row.model for row in self.rows):
            raise ValueError("long_prompts reads each prompt once for all rows: no row can have a model of its own")
        self.check_claims(names)
        self.check_presets(names)

    @property
    def chosen(self) -> tuple[TableRow, ...]:
        """The rows that are measured."""
        return tuple(row for row in self.rows if not self.size.rows or row.name in ("plain", *self.size.rows))


class Measured(NamedTuple):
    """What the table shows: {(row, task): cell}, and {task: questions}."""

    cells: dict[tuple[str, str], Cell]
    questions: dict[str, list[Question]]


def check(config: TableConfig) -> None:
    """Raises InputError where a row's head does not go with its method, or a task does not exist."""
    _check_heads(config)
    read_tasks(config)


def measure(config: TableConfig) -> Measured:
    """Measures what is missing; heads and models that do not exist yet are trained first."""
    questions = read_tasks(config)
    for row in config.chosen:
        _ensure_trained(config, row)
    (config.folder / "runs").mkdir(parents=True, exist_ok=True)
    return Measured(_cells(config, questions), questions)


def write_table(config: TableConfig, measured: Measured) -> str:
    """Writes the table to the config's folder and returns the Markdown."""
    return write_page(config, measured.cells, measured.questions)


def _cells(config: TableConfig, questions: dict[str, list[Question]]) -> dict[tuple[str, str], Cell]:
    """Returns {(row, task): cell}, measuring what is not yet kept in the config's folder."""
    cells: dict[tuple[str, str], Cell] = {}
    asked = {question.id for some in questions.values() for question in some}
    corpora = {row.name: _corpus(config, row, asked) for row in config.chosen}
    rows, keys = Rows(config, questions, corpora), _keys(config, questions, corpora)
    plan = [(task, row) for task in questions for row in config.chosen]
    paths = {(row.name, task): config.folder / "runs" / f"{task}--{row.name}.json" for task, row in plan}
    found = {place: load_cell(path, keys[place]) for place, path in paths.items()}
    for done, (task, row) in enumerate(plan):
        cell, path = found[row.name, task], paths[row.name, task]
        if row.name == "plain" and any(found[other.name, task] is None for other in config.chosen):
            cell = None  # what is measured now is compared with plain decoding of now
        kept = cell is not None
        if cell is None:
            forget_programs()
            ready = rows.ready(row, task)
            cell = ready.measure(keys[row.name, task], questions[task], config.seed)
            cell = cell.beside(cells.get(("plain", task), cell))
            save_cell(path, cell, ready.warm)
        rows.passed(row, path, measured=not kept)
        cells[row.name, task] = cell
        print(
            f"{done + 1:>3}/{len(plan)} {task:<14} {row.name:<24} MAT {cell.mat:.2f}  "
            f"{cell.tokens_per_second:6.1f} tokens/s{'  (kept)' if kept else ''}",
            flush=True,
        )
    return cells


def _keys(
    config: TableConfig, questions: dict[str, list[Question]], corpora: dict[str, list[Question]]
) -> dict[tuple[str, str], str]:
    """Returns the fingerprint of every cell (row, task). A warm method's cell stands on those before it, and one with a
    head or a corpus on that; prompts that are read for all rows are read densely.
    """
    keys: dict[tuple[str, str], str] = {}
    for row in config.chosen:
        history = head_stamp(row.head) + model_stamp(row.model) + (stamp(corpora[row.name]) if row.corpus else "")
        history += "long prompts" if config.long_prompts else ""
        for task, asked in questions.items():
            size = config.size.max_new_tokens
            key = cell_key(config.model, config.draft, config.dtype, config.seed, size, row, asked)
            history = keys[row.name, task] = cell_key(key, history)
    return keys


def _corpus(config: TableConfig, row: TableRow, asked: set[str]) -> list[Question]:
    """Returns the questions whose replies the row starts from."""
    return spare_questions(config.questions, asked, row.corpus) if row.corpus else []


def read_tasks(config: TableConfig) -> dict[str, list[Question]]:
    """Returns {task: questions} for the tasks of the config."""
    per_task = config.size.per_task
    if config.generate:
        questions = generate(config.generate, per_task, config.seed, config.size.document_words)
    else:
        questions = read_questions(config.questions, per_task)
    tasks = list(dict.fromkeys(question.task for question in questions))
    for task in config.size.tasks:
        if task not in tasks:
            raise unknown_name(f"task of {config.table}", task, tasks)
    wanted = config.size.tasks or tasks
    return {task: [q for q in questions if q.task == task] for task in tasks if task in wanted}


def _check_heads(config: TableConfig) -> None:
    """Raises InputError where a row has a head that its method has no use for, or lacks the one that it needs."""
    from decoding import METHODS

    for row in config.rows:
        own = row.method in METHODS and METHODS[row.method].own_head
        if row.head is not None and not row.draft and not own:
            raise InputError(f"row {row.name!r} has a head, which belongs to a draft: set draft to true")
        if row.head is None and own:
            raise InputError(f"row {row.name!r} drafts with a trained head: name its file in head")


def _ensure_trained(config: TableConfig, row: TableRow) -> None:
    """Trains the head or the model of a row where it does not exist yet."""
    if row.model is not None:
        ensure_model(row.model, row.train, config.model, config.dtype)
    if row.head is None:
        return
    if config.draft is not None and row.draft:
        ensure_head(row.head, row.train, config.model, config.draft, config.dtype)
    elif not row.draft:
        from experiments.train_draft_head import ensure_draft_head

        ensure_draft_head(row.head, row.train, config.model, config.dtype)
