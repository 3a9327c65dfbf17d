"""Pairs of a description and a small Python function that does what it says, written by code.

A function filters, changes and sums up a list of numbers or of words, in one expression or step by step; which of the
two is said in the description. Of one meaning there is one function and several ways to describe it, so that a
description decides what is to be written. Meanings for testing and for training are told apart by a hash: no function
is ever on both sides. `Meaning.apply` is what the function must return, put together without its text.
"""

import functools
import math
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from finetune.corpus import Example
from models.errors import InputError

_TEST_SHARE = 8  # one meaning of so many is for testing
_LETTERS = "abcdeimnst"


class Piece(NamedTuple):
    """A part of a meaning: wordings, of which one is chosen, the code's text, and what it computes.

    In wordings and code `{}` is the name of an element, or of what is summed up.
    """

    words: tuple[str, ...]
    code: str
    apply: Callable[[Any], Any]


def _numbered(words: Sequence[str], code: str, apply: Callable[[int, Any], Any], numbers: Sequence[Any]) -> list[Piece]:
    """Returns one piece for each value of `#` in wordings and code."""
    return [
        Piece(
            tuple(word.replace("#", str(k)) for word in words),
            code.replace("#", str(k)),
            functools.partial(apply, k),
        )
        for k in numbers
    ]


_ALL = Piece(("all {}", "the {}"), "", lambda x: True)
_NUMBER_FILTERS = [
    _ALL,
    Piece(("the even {}", "the {} that are even"), "{} % 2 == 0", lambda x: x % 2 == 0),
    Piece(("the odd {}", "the {} that are odd"), "{} % 2 == 1", lambda x: x % 2 == 1),
    Piece(("the positive {}", "the {} above zero"), "{} > 0", lambda x: x > 0),
    Piece(("the negative {}", "the {} below zero"), "{} < 0", lambda x: x < 0),
    *_numbered(("the {} above #", "the {} greater than #"), "{} > #", lambda k, x: x > k, range(2, 10)),
    *_numbered(("the {} below #", "the {} less than #"), "{} < #", lambda k, x: x < k, range(2, 10)),
    *_numbered(("the multiples of #", "the {} divisible by #"), "{} % # == 0", lambda k, x: x % k == 0, range(3, 10)),
]
_NUMBER_MAPS = [
    Piece(("",), "{}", lambda x: x),
    Piece((", squared", ", each times itself"), "{} * {}", lambda x: x * x),
    Piece((", doubled", ", each taken twice"), "{} + {}", lambda x: x + x),
    Piece((", negated", ", with the sign changed"), "-{}", lambda x: -x),
    Piece((", without their sign", ", made absolute"), "abs({})", abs),
    *_numbered((", plus #", ", each raised by #"), "{} + #", lambda k, x: x + k, range(2, 10)),
    *_numbered((", minus #", ", each lowered by #"), "{} - #", lambda k, x: x - k, range(2, 10)),
    *_numbered((", times #", ", each multiplied by #"), "{} * #", lambda k, x: x * k, range(3, 10)),
]
_NUMBER_SUMS = [
    Piece(("the sum of", "the total of"), "sum({})", sum),
    Piece(("the product of", "what comes of multiplying"), "math.prod({})", math.prod),
    Piece(("the largest of", "the maximum of"), "max({})", max),
    Piece(("the smallest of", "the minimum of"), "min({})", min),
    Piece(("a list of", "as a list"), "list({})", list),
]
_WORD_FILTERS = [
    _ALL,
    *_numbered(("the {} longer than # letters",), "len({}) > #", lambda k, x: len(x) > k, range(2, 8)),
    *_numbered(("the {} shorter than # letters",), "len({}) < #", lambda k, x: len(x) < k, range(2, 8)),
    *_numbered(("the {} that start with #",), "{}.startswith('#')", lambda k, x: x.startswith(k), _LETTERS),
    *_numbered(("the {} that end with #",), "{}.endswith('#')", lambda k, x: x.endswith(k), _LETTERS),
    *_numbered(("the {} that contain #", "the {} with #"), "'#' in {}", lambda k, x: k in x, _LETTERS),
]
_WORD_MAPS = [
    Piece(("",), "{}", lambda x: x),
    Piece((", in upper case", ", in capitals"), "{}.upper()", str.upper),
    Piece((", reversed", ", backwards"), "{}[::-1]", lambda x: x[::-1]),
    Piece((", capitalised", ", with a capital letter first"), "{}.capitalize()", str.capitalize),
    Piece((", each written twice", ", doubled"), "{} + {}", lambda x: x + x),
    Piece((", cut to two letters", ", of each the first two letters"), "{}[:2]", lambda x: x[:2]),
]
_WORD_SUMS = [
    Piece(("a list of", "as a list"), "list({})", list),
    Piece(("joined by spaces,", "in one text with spaces,"), "' '.join({})", " ".join),
    Piece(("joined by commas,", "in one text with commas,"), "','.join({})", ",".join),
    Piece(("the first in the alphabet of", "alphabetically the first of"), "min({})", min),
    Piece(("the last in the alphabet of", "alphabetically the last of"), "max({})", max),
]
_KINDS = {
    "numbers": (_NUMBER_FILTERS, _NUMBER_MAPS, _NUMBER_SUMS),
    "words": (_WORD_FILTERS, _WORD_MAPS, _WORD_SUMS),
}


class Meaning(NamedTuple):
    """What a function does: to a list of what, with which pieces, and whether in one expression."""

    kind: str
    keep: Piece
    change: Piece
    total: Piece
    is_short: bool

    def apply(self, values: Sequence[Any]) -> Any:
        """Returns what the function must return for a list; the largest of nothing is a ValueError, as in Python."""
        return self.total.apply([self.change.apply(value) for value in values if self.keep.apply(value)])

    def code(self) -> str:
        """Returns the function's text."""
        many, one = self.kind, self.kind[:-1]
        change, keep = self.change.code.replace("{}", one), self.keep.code.replace("{}", one)
        if self.is_short:
            inner = f"{change} for {one} in {many}" + (f" if {keep}" if keep else "")
            return f"def solve({many}):\n    return {self.total.code.format(inner)}"
        lines = [f"def solve({many}):", "    found = []", f"    for {one} in {many}:"]
        lines += [f"        if {keep}:"] if keep else []
        lines += [f"{' ' * (12 if keep else 8)}found.append({change})"]
        return "\n".join([*lines, f"    return {self.total.code.format('found').replace('list(found)', 'found')}"])

    def describe(self, rng: random.Random) -> str:
        """Returns a description, of which there are several."""
        total, keep, change = (rng.choice(piece.words) for piece in (self.total, self.keep, self.change))
        what = f"{total} {keep.format(self.kind)}{change}"
        how = rng.choice(("in one expression", "in one line") if self.is_short else ("step by step", "with a loop"))
        return rng.choice((f"return {what}, {how}", f"{how}: give {what}"))

    @property
    def is_test(self) -> bool:
        """Whether the function is for testing."""
        return zlib.crc32(self.code().encode()) % _TEST_SHARE == 0


@functools.cache
def meanings(test: bool) -> tuple[Meaning, ...]:
    """Returns every meaning that is for testing, or for training."""
    every = (
        Meaning(kind, keep, change, total, is_short)
        for kind, (keeps, changes, totals) in _KINDS.items()
        for keep in keeps
        for change in changes
        for total in totals
        for is_short in (True, False)
    )
    return tuple(meaning for meaning in every if meaning.is_test == test)


def code_pairs(size: int, seed: int, test: bool) -> list[Example]:
    """Returns examples: a description as the prompt, a function as the completion; `task` says of what kind of list.

    Every meaning comes once before any comes again, then described anew.

    Args:
        size: how many.
        seed: of the order and of the wordings.
        test: whether they are for testing.

    Raises:
        InputError: a size below 0.
    """
    if size < 0:
        raise InputError(f"size must not be negative, got {size}")
    rng = random.Random(f"{seed} {test}")
    found: list[Example] = []
    while len(found) < size:
        order = rng.sample(meanings(test), len(meanings(test)))
        found += [Example(one.describe(rng) + "\n", one.code(), one.kind) for one in order[: size - len(found)]]
    return found
