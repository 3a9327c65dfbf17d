"""From texts, prompts with completions, and conversations to rows of tokens, of which some are to be predicted.

What is to be predicted: of a text everything, of a prompt with a completion the completion and the end behind it, of a
conversation the assistant's turns with what the template ends them by. Prompts get the tokens that decoding gives them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from decoding.contexts import SLOT
from finetune.corpus import Example
from models.errors import InputError
from models.weights.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


class Row(NamedTuple):
    """Tokens of one text, whether each is to be predicted from those before it (never the first), and its source."""

    tokens: list[int]
    targets: list[bool]
    source: Sequence[int] = ()  # what an encoder reads; nothing where there is none


class Pairs(NamedTuple):
    """What rows for a model with an encoder are like: `pair` makes them.

    Attributes:
        start_token: what the text that is written begins with.
        source_length: tokens of the longest text that is read.
    """

    start_token: int
    source_length: int


class Compressed(NamedTuple):
    """What rows for a `models.dolphin.Dolphin` are like: `with_context` makes them.

    Attributes:
        tokenizer: the compressor's.
        memory: N, places of a row that its context takes.
        source_length: tokens of the longest context.
    """

    tokenizer: Tokenizer
    memory: int
    source_length: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Many rows, one behind the other.

    Attributes:
        tokens: i32[N].
        targets: bool[N].
        starts: i64[R + 1]: row r is tokens[starts[r] : starts[r + 1]].
        sources: i32[M]: what an encoder reads of all rows; empty where there is none.
        source_starts: i64[R + 1]: the bounds of each row's.
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    sources: np.ndarray
    source_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, i64[R]."""
        return np.diff(self.starts)

    @property
    def source_lengths(self) -> np.ndarray:
        """Tokens that an encoder reads of each row, i64[R]; all 0 where there is none."""
        return np.diff(self.source_starts)


def stack(rows: Sequence[Row]) -> Rows:
    """Returns rows as one value."""
    return Rows(
        np.array([token for row in rows for token in row.tokens], np.int32),
        np.array([target for row in rows for target in row.targets], bool),
        np.cumsum([0, *(len(row.tokens) for row in rows)], dtype=np.int64),
        np.array([token for row in rows for token in row.source], np.int32),
        np.cumsum([0, *(len(row.source) for row in rows)], dtype=np.int64),
    )


def encode(tokenizer: Tokenizer, item: str | Example | Messages) -> Row:
    """Returns the row of a text, a prompt with a completion, or a conversation.

    Args:
        tokenizer: of the model to be trained.
        item: a text and a completion get the end-of-text token behind them, where there is one; a conversation ends
            with the assistant's last turn.

    Raises:
        InputError: a conversation without an assistant's turn, or what the template does not allow.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if isinstance(item, str):
        tokens = tokenizer.encode(item)
        tokens += end if tokens[-1:] != end else []
        return Row(tokens, [index > 0 for index in range(len(tokens))])
    if isinstance(item, Example):
        row = _join(tokenizer, [(item.prompt, False), (item.completion, True)], add_special=True)
        return Row(row.tokens + end, row.targets + [True] * len(end))
    return _join(tokenizer, _turns(tokenizer, item), add_special=False)


def pair(row: Row, start_token: int) -> Row:
    """Returns a row for a model with an encoder, which reads all that stands before the last answer.

    Prompt and answer have the tokens that a decoder-only model gets, so that one can teach the other.

    Args:
        row: of a prompt with a completion, or of a conversation.
        start_token: what the answer begins with; it takes the place of the prompt.
    """
    cut = len(row.targets) - row.targets[::-1].index(False) if False in row.targets else 0
    answer = row.tokens[cut:]
    return Row([start_token, *answer], [False] + [True] * len(answer), row.tokens[:cut])


def with_context(row: Row, context: str, compressed: Compressed, bos_id: int | None) -> Row:
    """Returns a row with a context as its source, in the compressor's tokens, and places of id -1 for its memory.

    These stand in front of the row, behind its beginning-of-text token where it has one; nothing is predicted there.
    """
    first = int(row.tokens[:1] == [bos_id])
    tokens = [*row.tokens[:first], *[SLOT] * compressed.memory, *row.tokens[first:]]
    targets = [*row.targets[:first], *[False] * compressed.memory, *row.targets[first:]]
    return Row(tokens, targets, compressed.tokenizer.encode(context))


def as_chat(example: Example) -> Messages:
    """Returns a prompt and its completion as a user's and an assistant's turn."""
    return [
        {"role": "user", "content": example.prompt.strip()},
        {"role": "assistant", "content": example.completion.strip()},
    ]


def _join(tokenizer: Tokenizer, spans: Sequence[tuple[str, bool]], add_special: bool) -> Row:
    """Encodes spans of text; each starts with a token of its own, as a reply behind a prompt does."""
    tokens: list[int] = []
    targets: list[bool] = []
    text = ""
    for span, wanted in spans:
        text += span
        whole = tokenizer.encode(text, add_special=add_special)
        is_longer = whole[: len(tokens)] == tokens
        new = whole[len(tokens) :] if is_longer else tokenizer.encode(span, add_special=False)
        tokens += new
        targets += [wanted] * len(new)
    return Row(tokens, [target and index > 0 for index, target in enumerate(targets)])


def _turns(tokenizer: Tokenizer, messages: Messages) -> list[tuple[str, bool]]:
    """Returns a conversation as (text, whether the assistant wrote it), up to the end of the assistant's last turn."""
    whole = tokenizer.chat(messages, add_generation_prompt=False)
    spans, done = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise InputError("the conversation starts with the assistant; let a user's turn come first")
        before = tokenizer.chat(messages[:index], add_generation_prompt=True)
        behind = tokenizer.chat(messages[: index + 1], add_generation_prompt=False).rstrip()
        if not (whole.startswith(before) and whole.startswith(behind) and len(behind) > len(before)):
            raise InputError(
                f"the chat template writes turn {index + 1} otherwise when more turns follow, so that the assistant's "
                "words cannot be told apart; give prompt and completion as plain text, or take another model"
            )
        spans += [(whole[done : len(before)], False), (whole[len(before) : len(behind)], True)]
        done = len(behind)
    if not spans:
        raise InputError("the conversation has no turn of the role 'assistant', so nothing to learn")
    return spans


def fit(rows: Sequence[Row], length: int, cut: bool, source_length: int = 0) -> tuple[Rows, list[str]]:
    """Brings rows to at most `length` tokens and leaves out those in which nothing is to be predicted.

    Args:
        rows: of any lengths.
        length: from 2 up.
        cut: longer rows are cut into pieces, each of which starts with the last token of the one before, so that every
            token is predicted once. False: longer rows are left out, as an answer without its end, or without the
            beginning of its question, teaches the wrong thing.
        source_length: rows with a longer source are left out.

    Returns:
        (the rows, a sentence on each thing that was done to some of them).
    """
    if length < 2:
        raise InputError(f"length must be at least 2 tokens, one to read and one to predict, got {length}")
    kept, long, empty, unread = [], 0, 0, 0
    for tokens, targets, source in rows:
        long += len(tokens) > length
        if not any(targets):
            empty += 1
        elif len(source) > source_length:
            unread += 1
        elif len(tokens) <= length:
            kept.append(Row(tokens, targets, source))
        elif cut:
            for start in range(0, len(tokens) - 1, length - 1):
                piece = slice(start, start + length)
                kept.append(Row(tokens[piece], [False, *targets[piece][1:]]))
    notes = []
    if long:
        longest = max(len(row.tokens) for row in rows)
        what = "cut into pieces" if cut else "left out"
        notes.append(f"{long} of {len(rows)} texts {what}: longer than {length} tokens (the longest has {longest})")
    if unread:
        longest = max(len(row.source) for row in rows)
        notes.append(
            f"{unread} of {len(rows)} texts left out: what is read is longer than source_length, {source_length} "
            f"tokens (the longest has {longest})"
        )
    if empty:
        notes.append(f"{empty} of {len(rows)} texts left out: nothing in them is to be predicted")
    return stack(kept), notes
