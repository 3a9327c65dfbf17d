"""Questions that code writes, with answers that are scored exactly: multi-step arithmetic, operations on lists and
words, and facts to find in a long document.

Documents are as long as is asked for; those of tasks with a size in their name (`key_value_4k`) make prompts of just
below so many times 1024 tokens, with a tokenizer that takes digits one by one.

Numbers and words are drawn anew for every question from a seed, so that no file of them is needed.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Callable, Sequence

from experiments.needles import key_value_document, needle_document
from experiments.questions import Question
from models.errors import unknown_name

_NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ines", "Jonas")
_THINGS = ("pencils", "marbles", "stamps", "cookies", "shells", "coins", "cards", "buttons", "apples", "beads")
_WORDS = ("river", "stone", "candle", "garden", "window", "basket", "copper", "meadow", "silver", "lantern", "harbor")
_END = "End your reply with a line `Answer: ` and the answer."


def arithmetic(rng: random.Random) -> Question:
    """A story in four steps whose answer is a whole number."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    start, more, boxes, size = rng.randint(12, 60), rng.randint(5, 40), rng.randint(2, 9), rng.randint(3, 12)
    away = rng.randint(2, start + more + boxes * size - 1)
    text = (
        f"{name} has {start} {thing} and finds {more} more. Then {name} buys {boxes} boxes with {size} {thing} in "
        f"each, and gives away {away} {thing}. How many {thing} does {name} have now? Think step by step. {_END}"
    )
    return Question("", "arithmetic", (text,), answer=str(start + more + boxes * size - away))


def lists(rng: random.Random) -> Question:
    """What a short Python expression over a list of numbers gives."""
    numbers = rng.sample(range(2, 40), rng.randint(5, 7))
    limit = sorted(numbers)[len(numbers) // 2]
    code, value = rng.choice(
        [
            (f"sum(x for x in a if x > {limit})", sum(x for x in numbers if x > limit)),
            (f"len([x for x in a if x < {limit}])", len([x for x in numbers if x < limit])),
            ("sorted(a)[2]", sorted(numbers)[2]),
            ("max(a) - min(a)", max(numbers) - min(numbers)),
            ("sum(a[::2])", sum(numbers[::2])),
        ]
    )
    return Question(
        "", "lists", (f"In Python, a = {numbers}. What is the value of `{code}`? {_END}",), answer=str(value)
    )


def words(rng: random.Random) -> Question:
    """An operation on a few words whose answer is one word."""
    chosen = rng.sample(_WORDS, 5)
    listed = ", ".join(chosen)
    text, answer = rng.choice(
        [
            (f"Which of these words comes first in alphabetical order: {listed}?", min(chosen)),
            (f"Which of these words comes last in alphabetical order: {listed}?", max(chosen)),
            (f"Here is a list: {listed}. Which word comes right after {chosen[2]}?", chosen[3]),
            (f"Write the word {chosen[0]} backwards.", chosen[0][::-1]),
        ]
    )
    return Question("", "words", (f"{text} {_END}",), answer=answer)


def needles(task: str, hops: int, rng: random.Random, document_words: int) -> Question:
    """One fact among many like it in a document, or two that must be put together."""
    document, question, answer = needle_document(rng, document_words, hops)
    return Question("", task, (f"{question} Reply with the code.",), document, answer)


def lone_needle(rng: random.Random, document_words: int) -> Question:
    """The only fact of a document; the sentence is asked for, so that it is looked up while it is written."""
    document, question, answer = needle_document(rng, document_words, 1, most_facts=1)
    return Question("", "lone_needle", (f"{question} Reply with the sentence that says it.",), document, answer)


def key_value(rng: random.Random, document_words: int) -> Question:
    """The value of one key of a JSON object, of which the line is asked for."""
    document, question, answer = key_value_document(rng, document_words)
    return Question("", "key_value", (f"{question} Reply with the line of that key.",), document, answer)


GENERATED: dict[str, Callable[[random.Random, int], Question]] = {
    "arithmetic": lambda rng, _: arithmetic(rng),
    "lists": lambda rng, _: lists(rng),
    "words": lambda rng, _: words(rng),
    "needle": functools.partial(needles, "needle", 1),
    "two_needles": functools.partial(needles, "two_needles", 2),
    "lone_needle": lone_needle,
    "key_value": key_value,
}


def _sized(task: str, thousands: int) -> Callable[[random.Random, int], Question]:
    """Returns a task whose documents have a length of their own."""
    words = _WORDS_PER_THOUSAND[task] * thousands
    return lambda rng, _: dataclasses.replace(GENERATED[task](rng, words), task=f"{task}_{thousands}k")


_WORDS_PER_THOUSAND = {"lone_needle": 800, "key_value": 140}
GENERATED |= {f"{task}_{size}k": _sized(task, size) for task in _WORDS_PER_THOUSAND for size in (2, 4, 8, 16)}


def generate(tasks: Sequence[str], per_task: int, seed: int = 0, document_words: int = 400) -> list[Question]:
    """Returns `per_task` questions of each task; the first n are the same however many are asked for.

    Args:
        tasks: names in `GENERATED`.
        per_task: how many of each.
        seed: other seeds give other questions.
        document_words: length of the documents that some tasks ask about.

    Raises:
        InputError: an unknown task.
    """
    for task in tasks:
        if task not in GENERATED:
            raise unknown_name("generated task", task, GENERATED)
    names = [(task, f"{task}-{seed}-{index}") for task in tasks for index in range(per_task)]
    return [dataclasses.replace(GENERATED[task](random.Random(name), document_words), id=name) for task, name in names]


def is_correct(reply: str, answer: str) -> bool:
    """Returns whether the answer stands, as a word, in a reply: behind its last "Answer:", or else in its last line."""
    marked = re.split(r"answer:", reply, flags=re.IGNORECASE)
    tail = marked[-1] if len(marked) > 1 else (reply.strip().splitlines() or [""])[-1]
    return re.search(rf"(?<![\w.-]){re.escape(answer)}(?![\w-]|\.\d)", tail, flags=re.IGNORECASE) is not None
