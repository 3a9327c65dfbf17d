"""Long documents with facts to find, and questions with one right answer; made by code from a random state."""

import random

from models.errors import InputError

_FIRST = (
    "Ada", "Bela", "Carl", "Dora", "Emil", "Fay", "Gero", "Hana", "Ivo", "Jana", "Kira", "Leon", "Mara", "Nils", "Olga",
    "Pia", "Rolf", "Sara", "Timo", "Vera",
)  # fmt: skip
_LAST = (
    "Abel", "Berg", "Conti", "Dahl", "Engel", "Fischer", "Gruber", "Holm", "Iversen", "Jung", "Keller", "Lang", "Moser",
    "Nolte", "Oster", "Peters", "Rossi", "Sommer", "Thal", "Weber",
)  # fmt: skip
_WHO = ("The gardener", "A visitor", "The night porter", "One of the cooks", "The bookkeeper", "An old friend")
_DID = ("waited", "read the paper", "talked about the weather", "looked for an umbrella", "drank tea", "hummed a song")
_WHERE = ("in the hall", "by the window", "on the stairs", "under the old clock", "in the yard", "next to the stove")
_WHEN = ("before breakfast", "all afternoon", "while it rained", "after the bell had rung", "until the lamps were lit")
_ROOMS, _CODES = range(10, 1000), range(1000, 10000)
_KEYS, _VALUES, _MOST_PAIRS = range(1000, 10000), range(10000, 100000), 4000
_WORDS_PER_FACT = 30
_SENTENCES_PER_PARAGRAPH = 6


def needle_document(rng: random.Random, words: int, hops: int, most_facts: int = 400) -> tuple[str, str, str]:
    """Returns (document, question, answer): one fact, or a chain of two, among others of the same form and filler.

    With one hop the question shares its room's number with the sentence that holds the answer; with two it shares a
    name with a sentence that gives the room, and no number with the one that holds the answer, so that retrieval by
    words finds the first sentence, and the second by chance. No two facts of a form share a room, name or code, and
    filler has no digits: nothing but the fact itself gives the answer.

    Args:
        rng: all that is random; the same state gives the same three texts.
        words: the document's length; it ends with the sentence that reaches it. At least 60.
        hops: 1 ("What is the code of room 17?") or 2 ("What is the code of the room that Ada Berg's key opens?").
        most_facts: of a form, 1 to 400; 1 leaves a fact among filler alone.

    Returns:
        Paragraphs of a few sentences; the question; and the answer, four digits that a right reply must contain.

    Raises:
        InputError: fewer words, or another number of hops.
    """
    if hops not in (1, 2):
        raise InputError(f"hops must be 1 or 2, got {hops!r}")
    if words < 2 * _WORDS_PER_FACT:
        raise InputError(f"words must be at least {2 * _WORDS_PER_FACT}, got {words}")
    num = min(words // _WORDS_PER_FACT // hops, most_facts)
    names = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], num)
    rooms, codes = rng.sample(_ROOMS, num), rng.sample(_CODES, num)
    facts = [f"The code of room {room} is {code}." for room, code in zip(rooms, codes, strict=True)]
    question = f"What is the code of room {rooms[0]}?"
    if hops == 2:
        facts += [f"The key of {name} opens room {room}." for name, room in zip(names, rooms, strict=True)]
        question = f"What is the code of the room that the key of {names[0]} opens?"
    return _scattered(rng, facts, words), question, str(codes[0])


def key_value_document(rng: random.Random, words: int) -> tuple[str, str, str]:
    """Returns (document, question, answer): a JSON object of random numbers, and the value of one of its keys.

    All keys and values differ, so that nothing but the pair itself gives the answer; there is no filler.

    Args:
        rng: all that is random; the same state gives the same three texts.
        words: keys and values together, 2 to 8000; the object has half as many pairs.

    Returns:
        The object, a pair per line; the question; and the answer, five digits.

    Raises:
        InputError: fewer words, or more.
    """
    if not 2 <= words <= 2 * _MOST_PAIRS:
        raise InputError(f"words must be 2 to {2 * _MOST_PAIRS} for keys and values, got {words}")
    keys, values = rng.sample(_KEYS, words // 2), rng.sample(_VALUES, words // 2)
    asked = rng.randrange(len(keys))
    pairs = ",\n".join(f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True))
    return f"{{\n{pairs}\n}}", f'What is the value of the key "{keys[asked]}"?', str(values[asked])


def _scattered(rng: random.Random, facts: list[str], words: int) -> str:
    """Returns a document with the facts at random places among filler."""
    missing = words - sum(len(fact.split()) for fact in facts)
    filler: list[str] = []
    while missing > 0:
        filler.append(f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHERE)} {rng.choice(_WHEN)}.")
        missing -= len(filler[-1].split())
    sentences = facts + filler
    rng.shuffle(sentences)
    step = _SENTENCES_PER_PARAGRAPH
    return "\n\n".join(" ".join(sentences[i : i + step]) for i in range(0, len(sentences), step))
