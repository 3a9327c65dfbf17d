"""Questions that a context answers wrongly: what is known against what is said, with the intent spelled out or not.

Each item has a query, the answer that a model may know, and a context that says otherwise with an answer of another
item of its kind. With an intent (`use` or `ignore` the context) either answer is right; without one it is open.

Source: the task of "Controllable Context Sensitivity and the Knob Behind It" (2411.07404, section 3), on facts that
code can list in place of its data sets of Wikipedia's: arithmetic as there, capitals, opposites, what comes next.
"""

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from models.errors import unknown_name

Intent = Literal["use", "ignore"]
_SYSTEM = "Answer the query in one word."
_WORDS = {"use": "Go by the context alone.", "ignore": "Do not go by the context."}
_PAIRS = {
    "capitals": (
        "What is the capital of {}?",
        "The capital of {} is {}.",
        "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Greece Athens, "
        "Poland Warsaw, Norway Oslo, Sweden Stockholm, Finland Helsinki, Ireland Dublin, Hungary Budapest, "
        "Japan Tokyo, China Beijing, India Delhi, Russia Moscow, Egypt Cairo, Turkey Ankara, Canada Ottawa, "
        "Australia Canberra, Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi, Iran Tehran, Iraq Baghdad, "
        "Thailand Bangkok, Vietnam Hanoi, Belgium Brussels, Denmark Copenhagen, Ukraine Kiev",
    ),
    "opposites": (
        "What is the opposite of {}?",
        "The opposite of {} is {}.",
        "hot cold, big small, up down, left right, good bad, black white, day night, open closed, fast slow, old new, "
        "high low, rich poor, happy sad, long short, wet dry, full empty, hard soft, light dark, strong weak, "
        "early late, true false, first last, love hate, win lose, buy sell, north south, east west, young old",
    ),
    "languages": (
        "Which language is spoken in {}?",
        "The language spoken in {} is {}.",
        "France French, Germany German, Italy Italian, Spain Spanish, Portugal Portuguese, Greece Greek, "
        "Japan Japanese, China Chinese, Russia Russian, Turkey Turkish, Sweden Swedish, Norway Norwegian, "
        "Poland Polish, Hungary Hungarian, Finland Finnish, Denmark Danish, England English, Mexico Spanish",
    ),
    "next": (
        "What comes after {}?",
        "After {} comes {}.",
        "Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday, "
        "January February, February March, March April, April May, May June, June July, July August, "
        "August September, September October, October November, November December, one two, two three, three four, "
        "four five, five six, six seven, seven eight, eight nine, nine ten",
    ),
}
FAMILIES = (*_PAIRS, "arithmetic")


class Item(NamedTuple):
    """A query with what is known and what a context says; both answers are single words."""

    family: str
    query: str
    context: str
    known: str
    said: str

    def answer(self, intent: Intent) -> str:
        """Returns the right answer under an intent."""
        return self.said if intent == "use" else self.known


def items(families: Sequence[str], contexts: int, seed: int) -> list[Item]:
    """Returns items of some families, those of one query side by side: `contexts` of each, with different answers.

    Raises InputError for a family that there is not.
    """
    made: list[Item] = []
    for family in families:
        if family not in FAMILIES:
            raise unknown_name("family of context tasks", family, FAMILIES)
        rng = random.Random(f"{seed} {family}")
        made += _arithmetic(contexts, rng) if family == "arithmetic" else _listed(family, contexts, rng)
    return made


def _listed(family: str, contexts: int, rng: random.Random) -> list[Item]:
    query, statement, text = _PAIRS[family]
    pairs = [tuple(pair.split()) for pair in text.split(", ")]
    answers = sorted({answer for _, answer in pairs})
    return [
        Item(family, query.format(thing), statement.format(thing, other), known, other)
        for thing, known in pairs
        for other in rng.sample([answer for answer in answers if answer not in (known, thing)], contexts)
    ]


def _arithmetic(contexts: int, rng: random.Random) -> list[Item]:
    """Sums and differences with results of one digit; a context gives a part of them another value."""
    made = []
    for a in range(1, 10):
        for b in range(1, 10):
            sign = rng.choice("+-")
            inner = a + b if sign == "+" else a - b
            if not 0 <= inner <= 9:
                continue
            c = rng.randint(0, 9 - inner)
            for other in rng.sample([x for x in range(10 - c) if x != inner], min(contexts, 9 - c)):
                context = f"({a} {sign} {b}) = {other}."
                made.append(
                    Item("arithmetic", f"What is ({a} {sign} {b}) + {c}?", context, f"{inner + c}", f"{other + c}")
                )
    return made


def split(made: Sequence[Item], test_share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Returns (items to train on, items to test on), which share no query; both in an order of their own."""
    queries = sorted({item.query for item in made})
    rng = random.Random(f"split {seed}")
    rng.shuffle(queries)
    chosen = set(queries[: round(test_share * len(queries))])
    mixed = list(made)
    rng.shuffle(mixed)
    return [item for item in mixed if item.query not in chosen], [item for item in mixed if item.query in chosen]


def prompt(item: Item, intent: Intent | None, with_context: bool = True) -> list[dict[str, str]]:
    """Returns a conversation up to the answer: context, intent (None: open) and query, a line each."""
    lines = [f"Context: {item.context}"] if with_context else []
    lines += [f"Instruction: {_WORDS[intent]}"] if intent else []
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": "\n".join([*lines, f"Query: {item.query}"])},
    ]


def conversation(item: Item, intent: Intent) -> list[dict[str, str]]:
    """Returns a conversation with the answer that is right under an intent."""
    return [*prompt(item, intent), {"role": "assistant", "content": item.answer(intent)}]
