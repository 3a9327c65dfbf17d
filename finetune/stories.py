"""Stories that code writes, word by word, from a grammar whose law of the next word is known exactly.

So a model's texts can be held against the truth itself: which words could stand where they stand, and how likely they
were. A story is a run of sentences such as "then mira carried a small lamp near the harbour .". What may come next
depends on the place in the sentence, on whom the last name was of (`he` or `she`) and on the verb; how likely each word
is depends on the domain too: in another domain other words are the common ones.
"""

import functools
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from models.errors import InputError
from models.weights.tokenizer import Tokenizer


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SHE = _words("mira ada lena rosa vera ines nora petra wanda olga tilda selma")
_HE = _words("tom karl otto hugo jonas anton felix bruno emil viktor oskar rafael")
_OBJECTS = {
    "thing": _words("lamp letter basket violin mirror kettle ladder blanket coin lantern box rope clock map hammer"),
    "food": _words("bread soup apple cheese honey pear cake onion plum porridge fish tea carrot walnut jam"),
    "animal": _words("horse goat cat dog sparrow donkey rabbit owl sheep fox hen mouse beetle heron otter"),
}
_VERBS = {
    "thing": _words("carried found lost repaired painted hid sold borrowed dropped polished"),
    "food": _words("cooked ate bought peeled tasted shared stole burned wrapped weighed"),
    "animal": _words("fed followed washed watched chased called drew feared brushed freed"),
}
_ADJECTIVES = {
    "thing": _words("small old heavy broken golden dusty strange wooden"),
    "food": _words("fresh sweet cold warm bitter salty ripe stale"),
    "animal": _words("tired brave quiet hungry wild shy clever lame"),
}
_PLACES = _words("harbour garden market forest kitchen tower bridge meadow cellar school mill station")
_OPENERS = _words("then later soon suddenly yesterday often finally again")
_LINKS = _words("in near behind beside under")
_KINDS = {verb: kind for kind, verbs in _VERBS.items() for verb in verbs}
_WORST = math.log(1e-4)  # what a word counts that cannot stand where it stands
_UNKNOWN = "<unknown>"


class State(NamedTuple):
    """What the law of the next word depends on: the place in the sentence, who was told of last, the verb."""

    place: str = "start"
    who: str = ""
    verb: str = ""


Law = Mapping[str, tuple[float, State]]  # word -> (probability, the state behind it)


@functools.cache
def law(state: State, domain: int) -> Law:
    """Returns the law of the next word; every word leads to one state, so that a text has one reading."""
    options: dict[str, tuple[float, State]] = {}
    for share, words, after in _branches(state):
        # Ranked anew for each domain and, with the verb, for each verb: who knows the verb knows the common objects.
        ranked = random.Random(f"{domain} {state.place} {state.verb} {words[0]}").sample(words, len(words))
        weights = [1.0 / rank for rank in range(1, len(ranked) + 1)]
        for word, weight in zip(ranked, weights, strict=True):
            following = state._replace(verb=word, place=after) if after == "object" else state._replace(place=after)
            options[word] = share * weight / sum(weights), following
    return {word: (p, _settled(word, following)) for word, (p, following) in options.items()}


def _branches(state: State) -> list[tuple[float, Sequence[str], str]]:
    """Returns (probability, words, place behind them) of the kinds of words that can follow."""
    kind = _KINDS.get(state.verb, "")
    people: list[tuple[float, Sequence[str], str]] = [(0.5, _SHE, "verb"), (0.5, _HE, "verb")]
    if state.who:
        people = [(0.5, [state.who], "verb"), (0.25, _SHE, "verb"), (0.25, _HE, "verb")]
    return {
        "start": [(0.7 * share, words, place) for share, words, place in people] + [(0.3, _OPENERS, "subject")],
        "subject": people,
        "verb": [(1 / 3, verbs, "object") for verbs in _VERBS.values()],
        "object": [(0.6, ["the"], "noun"), (0.4, ["a"], "noun")],
        "noun": [(0.4, _ADJECTIVES.get(kind, ()), "bare"), (0.6, _OBJECTS.get(kind, ()), "tail")],
        "bare": [(1.0, _OBJECTS.get(kind, ()), "tail")],
        "tail": [(0.5, ["."], "start"), (0.3, _LINKS, "where"), (0.2, ["and"], "verb")],
        "where": [(1.0, ["the"], "place")],
        "place": [(1.0, _PLACES, "stop")],
        "stop": [(1.0, ["."], "start")],
    }[state.place]


def _settled(word: str, state: State) -> State:
    """Returns the state behind a word: names decide who is told of, and a verb is forgotten with its object."""
    who = "she" if word in _SHE else "he" if word in _HE else state.who
    verb = state.verb if state.place in ("object", "noun", "bare") else ""
    return State(state.place, who, verb)


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns every word that a story can have."""
    groups = [_SHE, _HE, ("she", "he", "the", "a", "and", "."), _PLACES, _OPENERS, _LINKS]
    groups += [words for table in (_OBJECTS, _VERBS, _ADJECTIVES) for words in table.values()]
    return tuple(itertools.chain.from_iterable(groups))


@functools.cache
def properties() -> tuple[str, ...]:
    """Returns what can be said of a place in a story, behind a word: the word, and the parts of the law's state."""
    places = ("start", "subject", "verb", "object", "noun", "bare", "tail", "where", "place", "stop")
    states = [f"{part} {value}" for part, values in
              (("place", places), ("who", ("she", "he")), ("verb", _KINDS)) for value in values]  # fmt: skip
    return (*(f"word {word}" for word in vocabulary()), *states)


def story_properties(words: Sequence[str], domain: int) -> np.ndarray:
    """Returns bool[T, P]: which `properties` hold behind each word of a story that the domain's law could write.

    The first of them, as many as there are words, are the words.
    """
    numbers = {name: number for number, name in enumerate(properties())}
    held, state = np.zeros((len(words), len(numbers)), bool), State()
    for row, word in zip(held, words, strict=True):
        state = law(state, domain)[word][1]
        said = {"word": word, **state._asdict()}
        row[[numbers[f"{part} {value}"] for part, value in said.items() if value]] = True
    return held


def names_and_things() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Returns (names, things, other words without "the") of the vocabulary, for texts of another law."""
    things = tuple(itertools.chain.from_iterable(_OBJECTS.values()))
    return _SHE + _HE, things, _PLACES + _OPENERS + _LINKS + tuple(_KINDS)


class RecordWords(NamedTuple):
    """Words to make sentences of; verbs, adjectives and objects by the kind of thing that they go with."""

    names: tuple[str, ...]
    verbs: Mapping[str, tuple[str, ...]]
    adjectives: Mapping[str, tuple[str, ...]]
    objects: Mapping[str, tuple[str, ...]]
    links: tuple[str, ...]
    places: tuple[str, ...]


def record_words() -> RecordWords:
    """Returns words of the vocabulary, for texts of another law."""
    return RecordWords(_SHE + _HE, _VERBS, _ADJECTIVES, _OBJECTS, _LINKS, _PLACES)


def write(words: int, domain: int, seed: str) -> str:
    """Returns a story of so many words (a full stop is one), in `domain`; it may end in the middle of a sentence."""
    rng, state, text = random.Random(seed), State(), []
    for _ in range(words):
        options = law(state, domain)
        word = rng.choices(list(options), [p for p, _ in options.values()])[0]
        text.append(word)
        state = options[word][1]
    return " ".join(text)


def stories(size: int, words: int, domains: Sequence[int], seed: int, test: bool) -> list[str]:
    """Returns stories of the domains in turn; those for testing and those for training are drawn apart.

    Args:
        size: how many stories.
        words: words of each.
        domains: at least one.
        seed: other seeds give other stories.
        test: whether they are for testing.

    Raises:
        InputError: no domain, or fewer than 2 words.
    """
    if not domains or words < 2:
        raise InputError(f"stories need at least one domain and 2 words, got {list(domains)} and {words}")
    return [
        write(words, domains[index % len(domains)], f"{seed} {index // len(domains)} {test}") for index in range(size)
    ]


def read(words: Sequence[str], domain: int) -> Iterator[float | None]:
    """Yields the log-probability of each word, in nats, under the law of a domain.

    A word that cannot stand where it stands counts as -9.2 (a chance of 1e-4). What follows it up to the full stop has
    no reading and yields None; with the next sentence reading begins anew.
    """
    state: State | None = State()
    for word in words:
        if state is None:
            yield None
        elif word in (options := law(state, domain)):
            p, state = options[word]
            yield math.log(p)
        else:
            state = None
            yield _WORST
        if state is None and word == ".":
            state = State()


def truth(texts: Sequence[Sequence[str]], start: int, domain: int) -> dict[str, float]:
    """Returns how good texts are under the law that wrote the training texts.

    Args:
        texts: of words, prompts included.
        start: words of the prompt, which are read but not counted.
        domain: whose law.

    Returns:
        {"true_log_prob": mean of `read` over the words that have a reading, "possible": share of them that can stand
        where they stand}.
    """
    found = [value for text in texts for value in [*read(text, domain)][start:] if value is not None]
    possible = sum(value > _WORST for value in found)
    return {"true_log_prob": sum(found) / len(found), "possible": possible / len(found)}


def story_tokenizer() -> Tokenizer:
    """Returns a tokenizer whose ids are the words of the stories, and one for all other words. Nothing ends a text."""
    ids = {word: index for index, word in enumerate((_UNKNOWN, *vocabulary()))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=_UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, bos_id=None, eos_id=None, pad_id=None, stop_ids=(), chat_template=None)
