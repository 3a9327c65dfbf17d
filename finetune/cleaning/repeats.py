"""Passages that stand in the corpus more than once, word by word (Yi, 2403.04652, section 2:
sub-document deduplication; the procedure is that of 2107.06499, section 4.1).

A passage of at least `words` words that stood before, in the same text or an earlier one, is cut out; its first
occurrence stays. In place of a suffix array every window of `words` words gets a number, equal for equal windows, by
doubling: windows of 2n words are pairs of windows of n. That is exact, but for words, which are known by 64-bit hashes.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.cleaning.stage import Stage, Verdict
from models.errors import InputError

_WORD = re.compile(r"\S+")


@dataclasses.dataclass(frozen=True)
class RepeatsConfig:
    """What is cut.

    Attributes:
        words: fewest words of a passage; the paper it follows: 50 tokens.
        min_words: a text of which something was cut and fewer words are left is dropped.
    """

    words: int = 50
    min_words: int = 20

    def __post_init__(self) -> None:
        if self.words < 2 or self.min_words < 0:
            raise InputError(f"words must be at least 2 and min_words 0, got {self.words} and {self.min_words}")


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def word_hashes(texts: Sequence[str]) -> list[np.ndarray]:
    """Returns u64[words] for each text; words are what stands between spaces."""
    known = functools.cache(_hash)
    return [np.asarray([known(word) for word in _WORD.findall(text)], np.uint64) for text in texts]


def _window_numbers(words: np.ndarray, length: int) -> np.ndarray:
    """Returns i64[n - length + 1]: equal numbers for equal windows of a sequence i64[n]."""
    numbers, size = words, 1
    while size < length:
        step = min(size, length - size)
        pairs = numbers[:-step] * (int(numbers.max()) + 1) + numbers[step:]
        numbers, size = np.unique(pairs, return_inverse=True)[1].astype(np.int64), size + step
    return numbers


def repeated_spans(texts: Sequence[np.ndarray], length: int) -> list[list[tuple[int, int]]]:
    """Returns the passages to cut of each text, as [first, one past the last) word, in order and apart.

    A window that overlaps its own first occurrence is left alone: of a word that goes on and on one window stays.

    Args:
        texts: hashes of the words, u64[words] each; "before" means before in this order.
        length: words of a window.
    """
    sizes = [len(text) for text in texts]
    if not sum(sizes):
        return [[] for _ in texts]
    ids = np.unique(np.concatenate([np.asarray(text, np.uint64) for text in texts]), return_inverse=True)[1]
    ends = np.cumsum(sizes)
    between = ids.max() + 1 + np.arange(len(texts))  # a word of its own behind each text: no window goes over an end
    stream = np.insert(ids.astype(np.int64), ends, between)
    cut = np.zeros(len(stream) + 1, np.int64)
    if len(stream) >= length:
        numbers = _window_numbers(stream, length)
        _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        place = np.arange(len(numbers))
        again = place[place - first[inverse] >= length]
        np.add.at(cut, again, 1)
        np.add.at(cut, again + length, -1)
    is_cut, starts = np.cumsum(cut)[:-1] > 0, ends - sizes + np.arange(len(texts))
    return [_runs(is_cut[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def cut_spans(text: str, spans: Sequence[Sequence[int]]) -> str:
    """Returns a text without some of its words, [first, one past the last) each, and the space behind them."""
    places = [match.start() for match in _WORD.finditer(text)] + [len(text)]
    kept, position = [], 0
    for first, stop in spans:
        kept.append(text[position : places[first]])
        position = places[stop]
    return "".join([*kept, text[position:]]).strip() if spans else text


def repeats_stage(config: RepeatsConfig) -> Stage:
    """Returns the stage: passages that stood before are cut out, and texts that are nearly all of them dropped."""

    def decide(shards: Sequence[list[np.ndarray]]) -> list[list[list[tuple[int, int]]]]:
        spans = iter(repeated_spans([text for shard in shards for text in shard], config.words))
        return [[next(spans) for _ in shard] for shard in shards]

    def apply(texts: Sequence[str], decision: Any) -> list[Verdict]:
        return [_cut(text, spans, config) for text, spans in zip(texts, decision, strict=True)]

    return Stage("repeats", config, apply, word_hashes, decide)


def _cut(text: str, spans: Sequence[Sequence[int]], config: RepeatsConfig) -> Verdict:
    left = cut_spans(text, spans)
    return Verdict(None, "repeated passages") if spans and len(left.split()) < config.min_words else Verdict(left)
