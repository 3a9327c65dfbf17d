"""Texts to train on that code writes: small tasks on words and numbers, each with one right answer.

A question is a line, "reverse tamo", and the completion its answer, "omat"; both together have at most 48 characters.
Examples are drawn anew from a seed, so that no file of them is needed. The question itself says whether it is for
training or for testing (a hash of it): no seed and no size ever puts a test's question into the training set.
"""

import random
import string
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from models.errors import InputError, unknown_name

_TEST_SHARE = 8  # one question of so many is for testing


class Example(NamedTuple):
    """A prompt and what is to follow it; `task` is the name of what wrote it, "" where nothing did. `context` is what
    both are about, for models that read it apart; "" where there is none.
    """

    prompt: str
    completion: str
    task: str = ""
    context: str = ""


def _word(rng: random.Random, shortest: int, longest: int, letters: str = string.ascii_lowercase) -> str:
    return "".join(rng.choices(letters, k=rng.randint(shortest, longest)))


def _digits(number: int) -> str:
    """Returns a number with its lowest digit first, the sign in front: -12 is "-21"."""
    return "-" * (number < 0) + str(abs(number))[::-1]


def reverse(rng: random.Random) -> tuple[str, str]:
    """A word backwards."""
    word = _word(rng, 3, 6)
    return word, word[::-1]


def sort(rng: random.Random) -> tuple[str, str]:
    """The letters of a word in the order of the alphabet."""
    word = _word(rng, 3, 6)
    return word, "".join(sorted(word))


def shift(rng: random.Random) -> tuple[str, str]:
    """Every letter moved on in the alphabet by 1 to 3 places, from z on to a."""
    word, by = _word(rng, 3, 6), rng.randint(1, 3)
    return f"{by} {word}", "".join(chr((ord(letter) - ord("a") + by) % 26 + ord("a")) for letter in word)


def rotate(rng: random.Random) -> tuple[str, str]:
    """The first 1 to 3 letters of a word moved to its end."""
    word, by = _word(rng, 4, 7), rng.randint(1, 3)
    return f"{by} {word}", word[by:] + word[:by]


def interleave(rng: random.Random) -> tuple[str, str]:
    """The letters of two words of one length, in turn."""
    length = rng.randint(3, 5)
    first, second = _word(rng, length, length), _word(rng, length, length)
    return f"{first} {second}", "".join(a + b for a, b in zip(first, second, strict=True))


def double(rng: random.Random) -> tuple[str, str]:
    """Every letter twice."""
    word = _word(rng, 3, 6)
    return word, "".join(letter * 2 for letter in word)


def ends(rng: random.Random) -> tuple[str, str]:
    """The first and the last letter of each of a few words."""
    words = [_word(rng, 2, 5) for _ in range(rng.randint(2, 4))]
    return " ".join(words), " ".join(word[0] + word[-1] for word in words)


def count(rng: random.Random) -> tuple[str, str]:
    """How often a letter stands in a word."""
    word, letter = _word(rng, 5, 9, "abcd"), rng.choice("abcd")
    return f"{letter} {word}", str(word.count(letter))


def lookup(rng: random.Random) -> tuple[str, str]:
    """The number that belongs to one of a few letters."""
    table = {key: f"{rng.randrange(100):02}" for key in rng.sample(string.ascii_lowercase, rng.randint(3, 6))}
    key = rng.choice(list(table))
    return " ".join(f"{letter}{number}" for letter, number in table.items()) + f" {key}", table[key]


def add(rng: random.Random) -> tuple[str, str]:
    """The sum of two numbers below 1000, lowest digit first."""
    a, b = rng.randrange(1000), rng.randrange(1000)
    return f"{_digits(a)} {_digits(b)}", _digits(a + b)


def subtract(rng: random.Random) -> tuple[str, str]:
    """The difference of two numbers below 1000, lowest digit first, with a minus in front where it is negative."""
    a, b = rng.randrange(1000), rng.randrange(1000)
    return f"{_digits(a)} {_digits(b)}", _digits(a - b)


def digits(rng: random.Random) -> tuple[str, str]:
    """The sum of three to five digits modulo 10."""
    number = _word(rng, 3, 5, string.digits)
    return number, str(sum(map(int, number)) % 10)


def larger(rng: random.Random) -> tuple[str, str]:
    """The larger of two different numbers of three digits."""
    a, b = rng.sample(range(100, 1000), 2)
    return f"{a} {b}", str(max(a, b))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": reverse,
    "sort": sort,
    "shift": shift,
    "rotate": rotate,
    "interleave": interleave,
    "double": double,
    "ends": ends,
    "count": count,
    "lookup": lookup,
    "add": add,
    "subtract": subtract,
    "digits": digits,
    "larger": larger,
}


def generate(tasks: Sequence[str], size: int, seed: int, test: bool) -> list[Example]:
    """Returns examples of the tasks in turn; the first n are the same however many are asked for.

    Args:
        tasks: names in `TASKS`.
        size: how many examples in all.
        seed: other seeds give other examples.
        test: whether they are for testing; no question of the one kind is ever one of the other.

    Raises:
        InputError: no task, or an unknown one.
    """
    if not tasks:
        raise InputError(f"no task to write examples of; name some of: {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise unknown_name("generated task", task, TASKS)
    return [_draw(tasks[index % len(tasks)], f"{seed}-{index // len(tasks)}", test) for index in range(size)]


def _draw(task: str, name: str, test: bool) -> Example:
    rng = random.Random(f"{task}-{name}-{test}")
    while True:
        question, answer = TASKS[task](rng)
        prompt = f"{task} {question}\n"
        if (zlib.crc32(prompt.encode()) % _TEST_SHARE == 0) == test:
            return Example(prompt, answer, task)


def exact_match(replies: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Returns the share of replies that are their example's completion, spaces around them aside.

    Args:
        replies: one for each example, with nothing of the prompt.
        examples: at least one.

    Returns:
        {"all": share, and the share of each task among the examples}.
    """
    right: dict[str, list[bool]] = {"all": []}
    for reply, example in zip(replies, examples, strict=True):
        is_right = reply.strip() == example.completion.strip()
        for name in ("all", *([example.task] if example.task else [])):
            right.setdefault(name, []).append(is_right)
    return {name: sum(found) / len(found) for name, found in right.items()}
