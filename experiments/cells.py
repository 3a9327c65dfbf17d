"""The cells of a table: one method on the questions of one task, measured and kept in a file.

A cell is measured once: a file whose key (model, method, options, questions, tokens) is still the one asked for is read
back. Both sides of every comparison count token ids: MAT is new tokens per step, micro-averaged; seconds are those of
prompt and decoding, compilation apart.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.corpus import learnt_table
from experiments.generated import is_correct
from experiments.kept import keep, read_kept
from experiments.loading import Loader
from experiments.questions import Question
from experiments.runtime import machine
from experiments.timed import SharedPrompts, TimedDecode
from models.errors import InputError
from models.weights.whole import whole_file


@dataclasses.dataclass(frozen=True)
class Cell:
    """What was measured.

    Attributes:
        key: what it was measured on; a cell with another key is measured again.
        tokens: new token ids of every turn.
        steps: decoding steps, all turns together; so are the other counts and seconds.
        scored: replies that were scored, and `correct` how many of them were right.
        plain_tokens: new tokens of plain decoding on the same questions in the same run; so are its steps and seconds.
        machine: what it was measured on.
    """

    key: str
    tokens: list[list[int]]
    steps: int
    target_calls: int
    draft_calls: int
    drafted: int
    accepted: int
    histogram: list[int]
    prefill_seconds: float
    decode_seconds: float
    scored: int = 0
    correct: int = 0
    plain_tokens: int = 0
    plain_steps: int = 0
    plain_prefill_seconds: float = 0.0
    plain_decode_seconds: float = 0.0
    machine: str = ""

    def beside(self, plain: "Cell") -> "Cell":
        """Returns the cell with what plain decoding took in the same run."""
        return dataclasses.replace(
            self,
            plain_tokens=plain.emitted,
            plain_steps=plain.steps,
            plain_prefill_seconds=plain.prefill_seconds,
            plain_decode_seconds=plain.decode_seconds,
        )

    @property
    def emitted(self) -> int:
        """New tokens."""
        return sum(map(len, self.tokens))

    @property
    def mat(self) -> float:
        """Mean accepted tokens: new tokens per step."""
        return self.emitted / self.steps

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prompt and decoding."""
        return self.emitted / (self.prefill_seconds + self.decode_seconds)


def total(cells: Sequence[Cell]) -> Cell:
    """Returns the sum of cells, as one."""

    def added(name: str) -> Any:
        return sum(getattr(cell, name) for cell in cells)

    apart = ("key", "tokens", "histogram", "machine")
    names = [field.name for field in dataclasses.fields(Cell) if field.name not in apart]
    histogram = np.sum([cell.histogram for cell in cells], axis=0).tolist()
    tokens = [turn for cell in cells for turn in cell.tokens]
    return Cell("", tokens=tokens, histogram=histogram, **{name: added(name) for name in names})


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Shortens documents to the parts that the question calls for."""

    tokens: int = 512  # of the document that are left
    reader: Literal["draft", "both"] = "draft"  # who reads the shortened document

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError("tokens must be at least 1")


def longest_prompt(questions: Sequence[Question], tokenizer: Any, max_new_tokens: int) -> int:
    """Returns the bucket that holds every prompt, replies of earlier turns included.

    Raises:
        InputError: a model without a chat template.
    """
    from decoding.prefill import bucket_length

    if tokenizer is None or tokenizer.chat_template is None:
        raise InputError("the model has no chat template: choose an instruction-tuned model")

    def length(question: Question) -> int:
        own = [{"role": "user", "content": turn} for turn in (question.document, *question.turns)]
        return sum(len(tokenizer.encode_chat([message])) for message in own) + len(question.turns) * max_new_tokens

    return bucket_length(max(map(length, questions)))


class Row:
    """A method with its model: measures cells, and hands what stays warm from one to the next."""

    def __init__(
        self,
        tokenizer: Any,
        decode_fn: Any,
        params: Any,
        sampling: dict,
        retrieval: Retrieval | None = None,
        shared: SharedPrompts | None = None,
    ):
        """Takes a decode function and what it is called with."""
        self.tokenizer, self.decode_fn, self.sampling, self.retrieval = tokenizer, decode_fn, sampling, retrieval
        self.warm: Any = None
        self.timed = TimedDecode(decode_fn, params, shared)

    def take_warm(self, path: Path) -> None:
        """Takes up what was learned at the end of a kept cell."""
        cold = self.decode_fn.plan.steps().cold()
        self.warm = None if cold is None else load_warm(path, cold)

    def learn(self, loader: Loader, name: str, questions: Sequence[Question]) -> None:
        """Starts from the model's replies to these questions, in place of a cold table."""
        plan = self.decode_fn.plan
        self.warm = learnt_table(loader, name, questions, plan.room, plan.options.slots)

    def measure(self, key: str, questions: Sequence[Question], seed: int) -> Cell:
        """Decodes every turn of every question, each turn behind the ones before it."""
        cells = [cell for question in questions for cell in self._answer(question, seed)]
        return dataclasses.replace(total(cells), key=key, machine=machine())

    def _answer(self, question: Question, seed: int) -> list[Cell]:
        target, draft = self._documents(question)
        cells, replies = [], []
        for turn in range(len(question.turns)):
            turns = question.turns[: turn + 1]
            call = {} if draft is None else {"draft_prompts": [self._prompt(draft, turns, replies)]}
            own = zlib.crc32(f"{seed} {question.id} {turn}".encode())  # or all turns would draw the same numbers
            cells.append(self._decode(self._prompt(target, turns, replies), own, call))
            replies.append(self.tokenizer.decode(cells[-1].tokens[0]))
        if question.answer is not None:
            correct = int(is_correct(replies[-1], question.answer))
            cells[-1] = dataclasses.replace(cells[-1], scored=1, correct=correct)
        return cells

    def _documents(self, question: Question) -> tuple[str, str | None]:
        """Returns what target and draft model read of the document; None where the draft reads what the target does."""
        if self.retrieval is None or not question.document:
            return question.document, None
        from decoding.speculative.retrieval import shorten

        short = shorten(question.document, question.turns[0], self.tokenizer, self.retrieval.tokens)
        return (question.document, short) if self.retrieval.reader == "draft" else (short, None)

    def _prompt(self, document: str, turns: Sequence[str], replies: Sequence[str]) -> list[int]:
        first = f"{document}\n\n{turns[0]}" if document else turns[0]
        messages = [{"role": "user", "content": first}]
        for reply, turn in zip(replies, turns[1:], strict=True):
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": turn}]
        return self.tokenizer.encode_chat(messages)

    def _decode(self, prompt: list[int], seed: int, call: dict) -> Cell:
        inputs = self.decode_fn.inputs([prompt], seed, warm=self.warm, **call, **self.sampling)
        self.timed.warm_up(inputs)
        state, seconds = self.timed(inputs)
        output = self.decode_fn.output(state)
        self.warm = output.warm
        counts = {name: int(getattr(output.stats, name)[0]) for name in _COUNTS}
        tokens = output.tokens[0, : int(output.lengths[0])].tolist()
        histogram = output.stats.histogram[0].tolist()
        return Cell(
            "", [tokens], histogram=histogram, prefill_seconds=seconds.prefill, decode_seconds=seconds.decode, **counts
        )


_COUNTS = ("steps", "target_calls", "draft_calls", "drafted", "accepted")


def load_cell(path: Path, key: str) -> Cell | None:
    """Returns a kept cell, or None where there is none with this key."""
    kept = read_kept(path, key)
    try:
        return Cell(**kept) if kept is not None and kept["plain_tokens"] else None
    except (TypeError, KeyError):
        return None


def save_cell(path: Path, cell: Cell, warm: Any) -> None:
    """Keeps a cell, and beside it what the method has learned up to its end (an .npz); the cell's file comes last."""
    if warm is not None:
        import jax

        with whole_file(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
            np.savez(file, *map(np.asarray, jax.tree.leaves(warm)))
    keep(path, **dataclasses.asdict(cell))


def load_warm(path: Path, like: Any) -> Any:
    """Returns what `save_cell` kept beside a cell, in the structure of `like`."""
    import jax

    try:
        kept = np.load(path.with_suffix(".npz"))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"what was learned up to {path} cannot be read ({error}): delete {path}") from error
    with kept:
        return jax.tree.unflatten(jax.tree.structure(like), [kept[name] for name in kept.files])
