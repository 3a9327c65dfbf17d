"""Contexts of facts that code writes, and what is to be said of them: the three stages of Dolphin (2408.15518).

A context is a few sentences on people, "Mira is a baker from Lund and is 34 years old." Restoration wants the context
again; continuation goes on with what follows from it, the same facts told from the other end; instruction asks for one
of them, a word or a number. The paper takes contexts of the Pile, books and papers; answers here are exact.
"""

import random
import zlib
from typing import Literal

from finetune.corpus import Example
from models.errors import InputError

Stage = Literal["restoration", "continual", "instruction"]
_TEST_SHARE = 8  # one context of so many is for testing
NAMES = (
    *("Mira", "Tom", "Anna", "Otto", "Lena", "Hugo", "Nora", "Ivan", "Rosa", "Paul", "Ella", "Max"),
    *("Sara", "Leo", "Ruth", "Emil", "Clara", "Felix", "Alma", "Karl", "Dora", "Simon", "Greta", "Victor"),
)
JOBS = ("baker", "teacher", "doctor", "farmer", "lawyer", "painter", "pilot", "singer", "tailor", "writer")
TOWNS = ("Lund", "Paris", "Rome", "Berlin", "Oslo", "Madrid", "Vienna", "London", "Prague", "Lisbon")


def fact_example(rng: random.Random, stage: Stage, facts: int) -> Example:
    """Returns an example with its context.

    Args:
        rng: all that is random.
        stage: what is wanted.
        facts: people in the context, 1 to 24.
    """
    if not 1 <= facts <= len(NAMES):
        raise InputError(f"facts must be 1 to {len(NAMES)}, got {facts}")
    people = [(name, rng.choice(JOBS), rng.choice(TOWNS), rng.randrange(18, 90)) for name in rng.sample(NAMES, facts)]
    context = " ".join(f"{name} is a {job} from {town} and is {age} years old." for name, job, town, age in people)
    if stage == "restoration":
        return Example("Repeat the text.\n", context, stage, context)
    if stage == "continual":
        more = " ".join(f"The {job} from {town} is {name}, aged {age}." for name, job, town, age in people)
        return Example("Continue the text.\n", more, stage, context)
    name, job, town, age = rng.choice(people)
    asked = {"job": job, "town": town, "age": str(age)}
    what = rng.choice(list(asked))
    return Example(f"What is the {what} of {name}?\n", asked[what], "number" if what == "age" else "word", context)


def fact_examples(stage: Stage, size: int, facts: int, seed: int, test: bool) -> list[Example]:
    """Returns examples of a stage, each about a context of its own; a context is for training or for testing, by a hash
    of it, whatever the seed and the stage.
    """
    made = []
    for number in range(size):
        rng = random.Random(f"facts {stage} {seed} {number} {test}")
        example = fact_example(rng, stage, facts)
        while (zlib.crc32(example.context.encode()) % _TEST_SHARE == 0) != test:
            example = fact_example(rng, stage, facts)
        made.append(example)
    return made
