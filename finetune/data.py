"""Where texts to train on come from: code or the model that writes them, files, or the hub, the latter two by way of
`datasets`.

`read_data` gives rows for training and testing (`finetune.rows`), `finetune.packing.Batches` the batches of a run. All
rows are read before the first update. Where no test split is named, one is taken from the training rows: by a hash of
what is in them, so that equal rows are never on both sides and the order of a file does not matter.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from decoding.contexts import SLOT
from finetune.adapters.saved import Base
from finetune.code_pairs import code_pairs
from finetune.corpus import Example, generate
from finetune.data_configs import (
    CodeData,
    DataConfig,
    FactsData,
    GeneratedData,
    OthelloData,
    OwnTextsData,
    RecallData,
    RecordsData,
    StoriesData,
)
from finetune.facts import fact_examples
from finetune.library_code import library_pairs
from finetune.othello import games
from finetune.recall import recall_examples
from finetune.records import record_examples
from finetune.rows import Compressed, Pairs, Row, Rows, as_chat, encode, fit, pair, with_context
from finetune.self_texts import as_row, read_texts
from finetune.sources import FileData, HubData, Item, Placed, read_source
from finetune.stories import stories
from models.errors import InputError
from models.weights.tokenizer import Tokenizer

Beside = Pairs | Compressed


def code_examples(config: CodeData, test: bool) -> list[Example]:
    """Returns the pairs that a config names, to test or to train on."""
    size = config.test_size if test else config.size
    if config.source == "library":
        return list(library_pairs(test)[:size])
    return code_pairs(size, config.seed, test)


class Question(NamedTuple):
    """A prompt as the model sees it, the example that it came from, and what a compressor reads beside it."""

    tokens: list[int]
    example: Example
    context: list[int] | None = None


class TrainingData(NamedTuple):
    """What was read.

    Attributes:
        train: rows to train on, at least one.
        test: rows to test on; may be none.
        questions: the prompts among the latter, for `finetune.corpus.exact_match`.
        notes: sentences on what was cut or left out.
    """

    train: Rows
    test: Rows
    questions: tuple[Question, ...]
    notes: tuple[str, ...]


def read_data(
    config: DataConfig, tokenizer: Tokenizer, length: int, pairs: Beside | None = None, writer: Base | None = None
) -> TrainingData:
    """Reads, encodes and splits what a config names.

    Args:
        config: the source.
        tokenizer: of the model to be trained.
        length: most tokens of a row, from 2 up.
        pairs: of a model with an encoder, which reads prompts and writes completions, or with a compressor, which reads
            contexts; None: of any other.
        writer: the model that must have written texts of its own; None: any may have.

    Raises:
        InputError: no such task, file, dataset, split or column; texts that another model wrote; a row without the
            wanted text, named by its number; no row left to train on, or none to test on where some were asked for.
    """
    source, train, test, chat = _read(config, writer)
    train = _encode(train, tokenizer, chat, pairs)
    if test is not None:
        test = _encode(test, tokenizer, chat, pairs)
    else:
        train, test = _split(train, config.test_share)
    cut = any(isinstance(item, str) for item, _ in train)
    fitted = []
    for purpose, side in (("train", train), ("test", test)):
        rows, notes = fit([row for _, row in side], length, cut, 0 if pairs is None else pairs.source_length)
        if not len(rows) and (side or purpose == "train"):
            raise InputError(
                f"{source} has no rows to {purpose} on with length {length}: {'; '.join(notes) or 'too few are there'}"
            )
        fitted.append((rows, [f"{purpose}: {note}" for note in notes]))
    (rows, notes), (test_rows, test_notes) = fitted
    questions = (
        _question(item, row, pairs)
        for item, row in test
        if isinstance(item, Example) and len(row.tokens) <= length and any(row.targets)
        if pairs is None or len(row.source) <= pairs.source_length
    )
    return TrainingData(rows, test_rows, tuple(questions), (*notes, *test_notes))


def _read(config: DataConfig, writer: Base | None) -> tuple[str, Placed, Placed | None, bool]:
    """Returns (what to call the source, its items to train on, those to test on if the config names any, chat)."""
    if isinstance(config, FileData | HubData):
        return *read_source(config), config.columns.chat
    if isinstance(config, OwnTextsData):
        texts = read_texts(config.texts / "texts.jsonl", writer)
        train, test = ([(f"text {t.index}", as_row(t)) for t in texts if t.split == name] for name in ("train", "test"))
        return str(config.texts), train, test, False

    def side(size: int, test: bool) -> Placed:
        if isinstance(config, StoriesData):
            return [("a story", text) for text in stories(size, config.words, config.domains, config.seed, test)]
        if isinstance(config, RecallData):
            made = recall_examples(size, config.words, config.facts, config.seed, test)
            return [("a text to recall", example) for example in made]
        if isinstance(config, RecordsData):
            asked = record_examples(size, config.records, config.tasks, config.seed, test)
            return [("a question on records", example) for example in asked]
        if isinstance(config, OthelloData):
            return [("a game", text) for text in games(size, config.seed, test, config.turns)]
        if isinstance(config, CodeData):
            return [("a function", example) for example in code_examples(config, test)]
        if isinstance(config, FactsData):
            made = fact_examples(config.stage, size, config.facts, config.seed, test)
            return [("a context of facts", example) for example in made]
        return [(example.task, example) for example in generate(config.tasks, size, config.seed, test)]

    chat = isinstance(config, GeneratedData) and config.chat
    return f"{config.type} data", side(config.size, False), side(config.test_size, True), chat


def _encode(items: Placed, tokenizer: Tokenizer, chat: bool, pairs: Beside | None) -> list[tuple[Item, Row]]:
    encoded = []
    for place, item in items:
        try:
            if isinstance(item, Row):
                row = item
            else:
                row = encode(tokenizer, as_chat(item) if chat and isinstance(item, Example) else item)
            if isinstance(pairs, Compressed):
                row = _compressed(item, row, pairs, tokenizer)
            elif isinstance(item, Example) and item.context:
                raise InputError("these examples are about contexts: train a model with a compressor (set dolphin)")
            elif pairs is not None:
                row = _paired(item, row, pairs.start_token)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        encoded.append((item, row))
    return encoded


def _compressed(item: Item, row: Row, pairs: Compressed, tokenizer: Tokenizer) -> Row:
    if not isinstance(item, Example) or not item.context:
        raise InputError("a model with a compressor learns from examples about contexts: take data of type facts")
    return with_context(row, item.context, pairs, tokenizer.bos_id)


def _question(item: Example, row: Row, pairs: Beside | None) -> Question:
    prompt = row.tokens[: row.targets.index(True)]
    if not isinstance(pairs, Compressed):
        return Question(list(row.source) or prompt, item)
    first = prompt.index(SLOT)
    return Question([*prompt[: first + 1], *prompt[first + pairs.memory :]], item, list(row.source))


def _paired(item: Item, row: Row, start_token: int) -> Row:
    if isinstance(item, str) or row.targets[:1] == [True]:
        raise InputError(
            "a model with an encoder learns to answer what it reads, and here nothing is to be read before the text: "
            "give prompt and completion, or conversations"
        )
    return pair(row, start_token)


def _split(rows: Sequence[tuple[Item, Row]], share: float) -> tuple[list[tuple[Item, Row]], list[tuple[Item, Row]]]:
    """Returns (rows to train on, rows to test on): the latter a share of the different ones, but at least one."""
    keys = [hashlib.sha256(repr(row).encode()).digest() for _, row in rows]
    different = sorted(set(keys))
    chosen = set(different[: max(1, round(share * len(different)))] if share else [])
    sides: tuple[list, list] = ([], [])
    for key, row in zip(keys, rows, strict=True):
        sides[key in chosen].append(row)
    return sides
