"""From a text to what an encoder reads of it and what a decoder is to write: CodeT5+'s first stage (2305.07922, 3.2).

    corrupt     whole words are taken out in spans; each leaves a sentinel behind, and what is written is every sentinel
                with its span: read "x <0> y z <1>", write "<0> a b <1> c", the end of text
    split       the text is cut in two: read [CLM] and the first part, write the second
    complete    read [CLM] alone, write the whole text

All three are undone exactly by `restore` or by joining the parts. Texts come without their end token.

A word is a run of letters, digits and underscores with the space before it; every other character stands for itself,
so that words are known from the tokens' own bytes whatever they were cut into.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.errors import InputError
from models.weights.token_bytes import token_bytes
from models.weights.tokenizer import Tokenizer

_NAMES = {  # role -> what the token is called; some published files have the second name
    "cls": ("[CLS]", "<s>"),
    "clm": ("[CLM]",),
    "match": ("[Match]", "[ENC]"),
    "code": ("[CDec]", "[CDEC]"),
    "text": ("[TDec]", "[TDEC]"),
}
_MOST_SENTINELS = 100


class Specials(NamedTuple):
    """Ids of the tokens that tell a task, of the end of a text, and of the sentinels in their order; -1: there is none.

    `code` and `text` are what a decoder that writes code, or text, begins with.
    """

    cls: int
    clm: int
    match: int
    code: int
    text: int
    end: int
    sentinels: tuple[int, ...]


class Split(NamedTuple):
    """What is read and what is to be written, ids."""

    source: list[int]
    target: list[int]


def special_tokens(tokenizer: Tokenizer, roles: Sequence[str]) -> Specials:
    """Returns the ids of the special tokens.

    Args:
        tokenizer: of the model.
        roles: which must be there, of `Specials`' fields.

    Raises:
        InputError: one that must be there is not.
    """
    ids = {role: [tokenizer.backend.token_to_id(name) for name in names] for role, names in _NAMES.items()}
    found = {role: next((i for i in given if i is not None), -1) for role, given in ids.items()}
    sentinels = []
    for k in range(_MOST_SENTINELS):
        index = tokenizer.backend.token_to_id(f"<extra_id_{k}>")
        if index is None:
            break
        sentinels.append(index)
    specials = Specials(**found, end=-1 if tokenizer.eos_id is None else tokenizer.eos_id, sentinels=tuple(sentinels))
    names = _NAMES | {"sentinels": ("<extra_id_0>",), "end": ("an end of text",)}
    missing = [names[role][0] for role in roles if getattr(specials, role) in (-1, ())]
    if missing:
        raise InputError(
            f"the tokenizer has no {', '.join(missing)}, which these losses need: take a model whose tokenizer has "
            "them (tokenizer 'code' of a new model does), or leave the losses out"
        )
    return specials


class Words(NamedTuple):
    """Of each id, bool[V]: whether its first and its last byte are a word's (a space in front begins a new one)."""

    begins: np.ndarray
    ends: np.ndarray

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Returns bool[T]: where in a text, ids i[T], a word begins."""
        found = np.ones(len(tokens), bool)
        found[1:] = ~(self.begins[tokens[1:]] & self.ends[tokens[:-1]])
        return found


def word_table(tokenizer: Tokenizer) -> Words:
    """Returns which ids of a tokenizer go on with a word, and which can be gone on with."""
    tokens = [value or b" " for value in token_bytes(tokenizer)]

    def inside(byte: int) -> bool:
        return chr(byte).isalnum() or byte >= 128 or byte == ord("_")

    return Words(np.array([inside(token[0]) for token in tokens]), np.array([inside(token[-1]) for token in tokens]))


def corrupt(
    tokens: np.ndarray,
    starts: np.ndarray,
    specials: Specials,
    rng: np.random.Generator,
    share: float = 0.15,
    longest: int = 5,
) -> Split:
    """Takes spans of whole words out of a text.

    Spans have 1 to `longest` words, all numbers equally likely, so 3 on average; they are drawn at random places, never
    side by side, until `share` of the tokens is taken: too many by less than the last span.

    Args:
        tokens: i[T], at least 1.
        starts: bool[T] of `Words.starts`.
        specials: with sentinels.
        rng: of lengths and places.
        share: of the tokens that is taken.
        longest: words of a span, at most.

    Raises:
        InputError: more spans than sentinels.
    """
    bounds = np.append(np.flatnonzero(starts), len(tokens))
    count, budget = len(bounds) - 1, max(1, round(share * len(tokens)))
    taken = np.zeros(count + 2, bool)  # word w stands at w + 1
    spans: list[tuple[int, int]] = []
    lost = 0
    for first in rng.permutation(count):
        if lost >= budget:
            break
        stop = min(first + int(rng.integers(1, longest + 1)), count)
        if not taken[first : stop + 2].any():
            taken[first + 1 : stop + 1] = True
            spans.append((int(bounds[first]), int(bounds[stop])))
            lost += int(bounds[stop] - bounds[first])
    if len(spans) > len(specials.sentinels):
        raise InputError(
            f"a text of {len(tokens)} tokens has {len(spans)} spans to be taken out, but the tokenizer has "
            f"{len(specials.sentinels)} sentinels: take shorter texts, a smaller share or longer spans"
        )
    source, target, behind = [], [], 0
    for sentinel, (first, stop) in zip(specials.sentinels, sorted(spans), strict=False):
        source += [*tokens[behind:first].tolist(), sentinel]
        target += [sentinel, *tokens[first:stop].tolist()]
        behind = stop
    return Split(source + tokens[behind:].tolist(), [*target, specials.end])


def restore(split: Split, specials: Specials) -> list[int]:
    """Returns the text that `corrupt` took apart; raises InputError where sentinels are missing or out of order."""
    places = {sentinel: k for k, sentinel in enumerate(specials.sentinels)}
    spans: list[list[int]] = []
    for token in split.target[:-1] if split.target[-1:] == [specials.end] else split.target:
        if token in places:
            spans.append([])
            if places[token] != len(spans) - 1:
                raise InputError(f"sentinel {places[token]} stands where {len(spans) - 1} was to come")
        elif not spans:
            raise InputError("the spans begin without a sentinel")
        else:
            spans[-1].append(token)
    read = [places[token] for token in split.source if token in places]
    if read != list(range(len(spans))):
        raise InputError(f"the text that was read has sentinels {read}, the spans are {len(spans)}")
    return [token for one in split.source for token in (spans[places[one]] if one in places else [one])]


def split(tokens: np.ndarray, specials: Specials, rng: np.random.Generator) -> Split:
    """Cuts a text, i[T], behind 10 to 90 percent of its tokens, all places equally likely; T is at least 2."""
    if len(tokens) < 2:
        raise InputError(f"a text to be cut in two needs at least 2 tokens, got {len(tokens)}")
    first = max(1, int(np.ceil(0.1 * len(tokens))))
    last = max(first, min(len(tokens) - 1, int(0.9 * len(tokens))))
    pivot = int(rng.integers(first, last + 1))
    return Split([specials.clm, *tokens[:pivot].tolist()], [*tokens[pivot:].tolist(), specials.end])


def complete(tokens: np.ndarray, specials: Specials) -> Split:
    """Leaves the whole text, i[T], to be written."""
    return Split([specials.clm], [*tokens.tolist(), specials.end])
