"""A corpus whose faults are known: passages of Python's own language reference, with faults of many kinds.

Each text comes with its fault ("" where it has none), so that what a stage drops can be held against what it should.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from models.errors import InputError

_WORDS = 120  # of a passage, at least
_ADS = ("buy", "cheap", "watches", "now", "free", "shipping", "best", "price", "click", "here", "hot", "offer", "today")
_NOTICE = (
    "This page is part of a collection that is kept by volunteers. All rights are reserved by their owners; nothing "
    "on it may be copied without leave. The keepers of the collection do not promise that what is said here is right, "
    "nor that it will be here tomorrow. To be told of changes to the pages that you have read, leave your name with "
    "the porter at the front desk, who will write to you on the first day of every month of the year."
)


class Planted(NamedTuple):
    """A text, and what is wrong with it."""

    text: str
    fault: str = ""


def passages() -> list[str]:
    """Returns passages of 120 words or somewhat more, none of whose paragraphs stands in another."""
    from pydoc_data.topics import topics

    found, seen, passage = [], set(), []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = tuple(paragraph.split())
            if len(words) < 15 or words in seen or sum(map(str.isalpha, paragraph)) < 0.7 * len(paragraph):
                continue
            seen.add(words)
            passage.append(" ".join(words))
            if sum(len(part.split()) for part in passage) >= _WORDS:
                found.append("\n\n".join(passage))
                passage = []
    return found


def _edited(rng: random.Random, text: str, share: float) -> str:
    """Returns the text with a share of its words replaced by others of it."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = rng.choice(words)
    return " ".join(words)


def _garbled(rng: random.Random, text: str) -> str:
    return "".join("\ufffd" if rng.random() < 0.1 else character for character in text)


def _repeated(rng: random.Random, text: str) -> str:
    words = text.split()
    return " ".join([*words[:40], *words[10:22] * 8])


FAULTS: dict[str, Callable[[random.Random, str], str]] = {
    "copy": lambda rng, text: text,
    "near copy, 1 word in 100": lambda rng, text: _edited(rng, text, 0.01),
    "reworded, 1 word in 3": lambda rng, text: _edited(rng, text, 0.33),
    "notice behind it": lambda rng, text: f"{text}\n\n{_NOTICE}",
    "garbled": _garbled,
    "repeated n-grams": _repeated,
    "too short": lambda rng, text: " ".join(text.split()[:20]),
    "list of symbols": lambda rng, text: " # ".join(text.split()),
    "advertisement": lambda rng, text: " ".join(["the", "to", *rng.choices(_ADS, k=60), *text.split()[:40]]),
    "address and number": lambda rng, text: (
        f"{text} Write to j.doe{rng.randrange(99)}@mail.example.org or +1 555-201-3344."
    ),
}
WHOLE = ("address and number", "notice behind it", "reworded, 1 word in 3")  # faults that do not cost the text


def planted_corpus(size: int, seed: int) -> tuple[list[Planted], list[str]]:
    """Returns (texts in a random order, good texts to score by, of which none is among them).

    Half of the texts have no fault; copies are of these, every other fault is put into a passage of its own.

    Args:
        size: texts, at least 40.
        seed: other seeds give other passages, faults and orders.

    Raises:
        InputError: too few, or more than there are passages for.
    """
    rng, source = random.Random(seed), passages()
    most = len(source) // 2
    if not 40 <= size <= most:
        raise InputError(f"a corpus with planted faults has 40 to {most} texts, got {size}")
    rng.shuffle(source)
    clean, own = source[: size // 2], iter(source[size // 2 : size])
    kinds = list(FAULTS)
    texts = [Planted(text) for text in clean]
    for number in range(size - len(clean)):
        kind = kinds[number % len(kinds)]
        is_copy = kind.startswith(("copy", "near copy", "reworded"))
        texts.append(Planted(FAULTS[kind](rng, rng.choice(clean) if is_copy else next(own)), kind))
    rng.shuffle(texts)
    return texts, source[size:]
