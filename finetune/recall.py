"""Texts of facts to be recalled, however far back: what a longer context is for (Yi, 2403.04652, section 7.1).

A text is words of no meaning with a few facts among them, a name and the thing that belongs to it side by side, "mira
lamp". Behind it come questions, "the mira", each answered by the thing: the words are those of the stories
(`finetune.stories`), filler has no names and no things. Of a question's answer nothing is known but from the fact.
"""

import random

from finetune.corpus import Example
from finetune.stories import names_and_things
from models.errors import InputError

_ASK = "the"


def recall_example(rng: random.Random, words: int, facts: int, depth: float | None = None) -> Example:
    """Returns a text with questions behind it: all of its facts in a random order, or the one that stands at a depth.

    Args:
        rng: all that is random.
        words: of the text, at least twice the facts.
        facts: names that something belongs to, 1 to 24.
        depth: where the fact stands that is asked for, 0 (at the beginning) to 1 (at the end), as near as the other
            facts let it; None asks for all.

    Raises:
        InputError: other numbers of words or facts.
    """
    names, things, filler = names_and_things()
    if not 1 <= facts <= len(names) or words < 2 * facts:
        raise InputError(f"facts must be 1 to {len(names)} and words at least twice as many, got {facts} and {words}")
    pairs = list(zip(rng.sample(names, facts), rng.choices(things, k=facts), strict=True))
    gaps = words - 2 * facts
    places = [rng.randrange(gaps + 1) for _ in pairs]
    if depth is not None:
        places[0] = round(depth * gaps)
    at: dict[int, list[str]] = {}
    for place, pair in zip(places, pairs, strict=True):
        at.setdefault(place, []).extend(pair)
    text = [word for place in range(gaps + 1) for word in (*at.get(place, ()), *rng.choices(filler, k=place < gaps))]
    order = rng.sample(pairs, facts) if depth is None else pairs[:1]
    questions = [word for name, thing in order for word in (_ASK, name, thing)]
    return Example(" ".join([*text, *questions[:2]]), f" {' '.join(questions[2:])}", "recall")


def recall_examples(size: int, words: int, facts: int, seed: int, test: bool) -> list[Example]:
    """Returns texts with questions: for training all facts of each are asked for, for testing one at a random depth.

    Args:
        size: how many.
        words: of each text before its questions.
        facts: of each text.
        seed: other seeds give other texts.
        test: whether they are for testing; those are drawn apart.
    """
    made = []
    for number in range(size):
        rng = random.Random(f"recall {seed} {number} {test}")
        made.append(recall_example(rng, words, facts, rng.random() if test else None))
    return made
