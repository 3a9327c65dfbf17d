"""Questions on records, long to read and short to answer: what an encoder is for (2501.16273).

A record is a sentence, "mira carried a small lamp near the harbour ."; a name has one record. Behind all of them stands
the question, one of two tasks:

    find     "mira carried"          what, and where: "a small lamp near the harbour"
    gather   "and the harbour"       who was there, in the order of the records: "mira tom . . . ."

The words are those of the stories (`finetune.stories`), each a token. No token ends a text there, so that every answer
has six words: full stops fill it up, and a seventh name is left out.
"""

import random
from collections.abc import Sequence

from finetune.corpus import Example
from finetune.stories import record_words
from models.errors import InputError, unknown_name

TASKS = ("find", "gather")
ANSWER = 6  # words


def record_example(rng: random.Random, records: int, task: str) -> Example:
    """Returns a question on so many records, of a task; raises InputError for more records than there are names."""
    words = record_words()
    if not 1 <= records <= len(words.names):
        raise InputError(f"records must be 1 to {len(words.names)}, one for each name; got {records}")
    if task not in TASKS:
        raise unknown_name("task of records", task, TASKS)
    made = []
    for name in rng.sample(words.names, records):
        kind = rng.choice(list(words.verbs))
        what = f"a {rng.choice(words.adjectives[kind])} {rng.choice(words.objects[kind])}"
        made.append((name, rng.choice(words.verbs[kind]), what, rng.choice(words.links), rng.choice(words.places)))
    text = " ".join(f"{name} {verb} {what} {link} the {place} ." for name, verb, what, link, place in made)
    name, verb, what, link, place = rng.choice(made)
    if task == "find":
        return Example(f"{text} {name} {verb}", f" {what} {link} the {place}", task)
    there = [record[0] for record in made if record[4] == place] + ["."] * ANSWER
    return Example(f"{text} and the {place}", f" {' '.join(there[:ANSWER])}", task)


def record_examples(size: int, records: int, tasks: Sequence[str], seed: int, test: bool) -> list[Example]:
    """Returns questions of the tasks in turn.

    Args:
        size: how many.
        records: of each.
        tasks: names in `TASKS`, at least one.
        seed: other seeds give other records.
        test: whether they are for testing; those are drawn apart.

    Raises:
        InputError: no task, an unknown one, or more records than names.
    """
    if not tasks:
        raise InputError(f"no task to ask of records; name some of: {', '.join(TASKS)}")
    return [
        record_example(random.Random(f"records {seed} {number} {test}"), records, tasks[number % len(tasks)])
        for number in range(size)
    ]
