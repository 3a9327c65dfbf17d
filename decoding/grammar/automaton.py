"""From a regular expression to a table of what each token does in each state.

The expression becomes a deterministic automaton over bytes (by `outlines_core`, which wraps Rust's regex-automata), is
made minimal, and then every token is run through it from every state. Tokens that do the same in every state form a
class, so that the table is small: states times classes.

Texts are what the whole expression matches, and a state from which no text can be finished with the vocabulary's tokens
counts as no state at all: whatever is allowed can be finished.

Axis letters: S states, C classes, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from decoding.grammar.vocabulary import Vocabulary
from models.errors import InputError

END = "\U0010ffff"  # no character; stands behind the expression, so that no alternative is cut off by a shorter one
MOST_STATES = 4096


@dataclass(frozen=True, eq=False)
class TokenTable:
    """A grammar's table; state 0 is the empty text.

    Attributes:
        next: i32[S, C], the state behind a token of each class; -1 where the class is not allowed.
        accepting: bool[S], whether the text may end here.
        classes: i32[V], each token's class.
    """

    next: np.ndarray
    accepting: np.ndarray
    classes: np.ndarray

    def allowed(self) -> np.ndarray:
        """Returns bool[S, V]."""
        return (self.next >= 0)[:, self.classes]


def token_table(pattern: str, vocabulary: Vocabulary) -> TokenTable | None:
    """Returns the table of a regular expression (Rust's syntax, anchored at both ends), None where it is too large.

    Raises:
        InputError: the expression cannot be compiled, or no text of it can be written with the vocabulary.
    """
    steps, accepting = byte_automaton(pattern)
    if len(steps) > MOST_STATES:
        return None
    classes, examples = _classes(steps, vocabulary)
    following = np.stack([_walk(steps, state, *examples) for state in range(len(steps))])
    live = _live(following, accepting)
    if not live[0]:
        raise InputError(
            f"the grammar {pattern!r:.80} admits no token at all: no text of it can be written with this vocabulary"
        )
    following = np.where((following >= 0) & live[following], following, -1)
    number = np.cumsum(live) - 1
    following = np.where(following >= 0, number[following], -1)[live]
    return TokenTable(following.astype(np.int32), accepting[live], classes)


def byte_automaton(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (i32[S, 256] the state behind each byte, -1 where there is none; bool[S] states that accept); 0 starts.

    The automaton is minimal, and every state but perhaps the first leads to one that accepts.

    Raises:
        InputError: the expression cannot be compiled.
    """
    from outlines_core import Index, Vocabulary

    letters = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    try:
        index = Index(f"(?:{pattern})\\x{{{ord(END):x}}}", letters)
    except ValueError as error:
        if "no transitions" in str(error):
            raise InputError(f"the grammar {pattern!r:.80} admits no token at all: nothing matches it") from error
        raise InputError(f"the regular expression {pattern!r:.80} cannot be compiled: {error}") from error
    moves, last = index.get_transitions(), index.get_final_states()
    number = {state: place for place, state in enumerate({index.get_initial_state(): 0} | moves | dict.fromkeys(last))}
    steps = np.full((len(number), 256), -1, np.int32)
    for state, row in moves.items():
        for byte, target in row.items():
            if byte < 256:  # 256 is the library's own end of a text
                steps[number[state], byte] = number[target]
    states = np.arange(len(steps))
    for byte in END.encode():
        states = np.where(states >= 0, steps[states, byte], -1)
    over = np.isin(np.arange(len(steps)), [number[state] for state in last])
    accepting = (states >= 0) & over[states]
    steps[(steps >= 0) & over[steps]] = -1  # the end mark has done its work
    return _minimal(steps, accepting)


def _minimal(steps: np.ndarray, accepting: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the automaton with equal states joined and useless ones left out (Moore's algorithm)."""
    live = _live(steps, accepting)
    steps = np.where((steps >= 0) & live[steps], steps, -1)
    labels, count = accepting.astype(np.int64), 0
    while labels.max() + 1 > count:
        count = labels.max() + 1
        seen = np.where(steps >= 0, labels[steps], -1)
        labels = np.unique(np.concatenate([labels[:, None], seen], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    _, first = np.unique(labels, return_index=True)
    kept = first[(live[first]) | (labels[first] == labels[0])]
    kept = kept[np.argsort(labels[kept] != labels[0], kind="stable")]  # the first state comes first
    number = np.full(labels.max() + 1, -1)
    number[labels[kept]] = np.arange(len(kept))
    joined = steps[kept]
    return np.where(joined >= 0, number[labels[joined]], -1).astype(np.int32), accepting[kept]


def _live(steps: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """Returns bool[S]: states from which one that accepts can be reached, by i32[S, X] steps."""
    live = accepting.copy()
    while True:
        more = live | ((steps >= 0) & live[steps]).any(axis=1)
        if (more == live).all():
            return live
        live = more


def _classes(steps: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns i32[V] classes, and one token of each class as (bytes u8[C, X], lengths i32[C]).

    Tokens are told apart by a 64-bit sum of random numbers, one for each state and the state behind it.
    """
    tokens = [token or b"" for token in vocabulary.tokens]
    lengths = np.array([len(token) for token in tokens], np.int32)
    letters = np.zeros((len(tokens), max(int(lengths.max()), 1)), np.uint8)
    for place, token in enumerate(tokens):
        letters[place, : len(token)] = np.frombuffer(token, np.uint8)
    rng = np.random.default_rng(0)
    sums = np.zeros(len(tokens), np.uint64)
    for state in range(len(steps)):
        noise = rng.integers(0, 2**64, len(steps) + 1, np.uint64)
        sums += noise[_walk(steps, state, letters, lengths)]  # -1, no state, is the last
    _, first, classes = np.unique(sums, return_index=True, return_inverse=True)
    return classes.reshape(-1).astype(np.int32), (letters[first], lengths[first])


def _walk(steps: np.ndarray, state: int, letters: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns i32[X]: the state behind each of X tokens, -1 where there is none, or where the token has no text."""
    found = np.where(lengths > 0, steps[state, letters[:, 0]], -1)
    alive = np.flatnonzero((found >= 0) & (lengths > 1))
    for place in range(1, letters.shape[1]):
        if not len(alive):
            break
        found[alive] = steps[found[alive], letters[alive, place]]
        alive = alive[(found[alive] >= 0) & (lengths[alive] > place + 1)]
    return found
