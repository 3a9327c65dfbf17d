"""The grammars of a batch's rows, inside jit: tables on the device, or the parsing engine on the host.

Both say of each row's text which tokens may come next and whether it may end; `Constraint` is what decoding carries.

Axis letters: B batch, S states of all tables together, C classes, G tables, V vocabulary, W words of a bitmask.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.grammar.automaton import TokenTable
from decoding.grammar.bitmask import num_words, pack
from decoding.grammar.grammar import BY_NUMBER, Grammar
from models.errors import InputError

_SMALLEST = {"S": 32, "C": 64, "G": 1}
_RECENT: collections.deque[Grammar] = collections.deque(maxlen=256)  # a call may run on after its caller let go of them


@struct.dataclass
class Tables:
    """Tables of several grammars, one behind the other; sizes are padded to powers of two.

    Attributes:
        words: u32[S, W], tokens allowed in each state.
        accepting: bool[S].
        next: i32[S, C], the state behind a token of each class.
        classes: i32[G, V].
    """

    words: jax.Array
    accepting: jax.Array
    next: jax.Array
    classes: jax.Array


@struct.dataclass
class Constraint:
    """Where each row stands in its grammar.

    Attributes:
        which: i32[B], the row's table, or the number of its grammar (-1: none) where the engine is asked.
        state: i32[B], its state in the tables.
        tables: None where the engine is asked.
    """

    which: jax.Array
    state: jax.Array
    tables: Tables | None

    def allowed(self, tokens: jax.Array, lengths: jax.Array, done: jax.Array, vocab: int) -> tuple[jax.Array, ...]:
        """Returns (u32[B, W] tokens that may come next, bool[B] whether the text may end).

        Args:
            tokens: i32[B, N], the rows' new tokens.
            lengths: i32[B], how many they are.
            done: bool[B], rows that have ended; what is returned for them does not count.
            vocab: V.
        """
        if self.tables is not None:
            return self.tables.words[self.state], self.tables.accepting[self.state]
        batch, words = len(lengths), num_words(vocab)
        shapes = jax.ShapeDtypeStruct((batch, words), jnp.uint32), jax.ShapeDtypeStruct((batch,), jnp.bool_)
        ask = functools.partial(_ask, words=words)
        return jax.pure_callback(ask, shapes, self.which, tokens, lengths, done)

    def after(self, token: jax.Array, done: jax.Array) -> "Constraint":
        """Returns the constraint behind one more token, i32[B]; rows that are done stay where they are."""
        if self.tables is None:
            return self
        there = self.tables.next[self.state, self.tables.classes[self.which, token]]
        return self.replace(state=jnp.where(done | (there < 0), self.state, there))


def read_grammars(grammars: Any, batch: int, vocab: int, stop_tokens: tuple[int, ...]) -> Constraint | None:
    """Returns the rows' constraint at the beginning of their texts; None where no row has a grammar.

    Rows of tables alone need no host. Where one row's grammar has no table, the engine is asked for all of them.

    Args:
        grammars: one `Grammar` for all rows, or one per row, None where a row has none.
        batch: B.
        vocab: V, the width of the model's logits.
        stop_tokens: ids that end a row.

    Raises:
        InputError: something else than that, a grammar for another vocabulary, or no stop token to end a text with.
    """
    rows = [grammars] * batch if grammars is None or isinstance(grammars, Grammar) else grammars
    if not isinstance(rows, Sequence) or not all(row is None or isinstance(row, Grammar) for row in rows):
        raise InputError(
            f"grammars must be one Grammar, or one or None per row; got {grammars!r:.80}: make them with regex, lark "
            "or json_schema of decoding.grammar"
        )
    if len(rows) != batch:
        raise InputError(f"grammars must be one for each of {batch} prompts, got {len(rows)}")
    given = [row for row in rows if row is not None]
    for row in given:
        if row.vocabulary.size != vocab:
            raise InputError(
                f"a grammar was made for {row.vocabulary.size} tokens, the model has {vocab}: make its vocabulary with "
                "Vocabulary.of(tokenizer, model.config.vocab_size)"
            )
    if not given:
        return None
    if not stop_tokens:
        raise InputError("a grammar's text ends with a stop token: pass stop_tokens=tokenizer.stop_ids")
    if any(row.table is None for row in given):
        _RECENT.extend(dict.fromkeys(given))
        numbers = np.array([-1 if row is None else row.number for row in rows], np.int32)
        return Constraint(numbers, np.zeros(batch, np.int32), None)
    distinct = list(dict.fromkeys(rows))
    tables, starts = _stack(tuple(None if row is None else row.table for row in distinct), vocab)
    which = np.array([distinct.index(row) for row in rows], np.int32)
    return Constraint(which, starts[which], tables)


@functools.lru_cache(maxsize=8)
def _stack(tables: tuple[TokenTable | None, ...], vocab: int) -> tuple[Tables, np.ndarray]:
    """Returns the tables one behind the other on the device, and i32[G], the state that each of them begins with."""
    free = TokenTable(np.zeros((1, 1), np.int32), np.ones(1, bool), np.zeros(vocab, np.int32))
    parts = [free if table is None else table for table in tables]
    starts = np.cumsum([0, *(len(part.next) for part in parts)])
    size = {
        "S": _bucket("S", starts[-1]),
        "C": _bucket("C", max(part.next.shape[1] for part in parts)),
        "G": _bucket("G", len(parts)),
    }
    words = np.zeros((size["S"], num_words(vocab)), np.uint32)
    accepting, following = np.zeros(size["S"], bool), np.full((size["S"], size["C"]), -1, np.int32)
    classes = np.zeros((size["G"], vocab), np.int32)
    for index, (part, start) in enumerate(zip(parts, starts, strict=False)):
        end = start + len(part.next)
        words[start:end] = pack(part.allowed())
        accepting[start:end] = part.accepting
        following[start:end, : part.next.shape[1]] = np.where(part.next >= 0, part.next + start, -1)
        classes[index] = part.classes
    stacked = Tables(*(jnp.asarray(x) for x in (words, accepting, following, classes)))
    return stacked, starts[:-1].astype(np.int32)


def _bucket(axis: str, size: int) -> int:
    return max(_SMALLEST[axis], 1 << (int(size) - 1).bit_length())


def _ask(which: Any, tokens: Any, lengths: Any, done: Any, *, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `Constraint.allowed` does, from the parsing engine; a pure function of its arguments.

    Each grammar keeps the matchers that its rows used last, so that as a rule a row has one token to add.
    """
    which, tokens, lengths, done = (np.asarray(x) for x in (which, tokens, lengths, done))
    found = np.full((len(which), words), 0xFFFFFFFF, np.uint32)
    ends = np.ones(len(which), bool)
    for row in np.flatnonzero((which >= 0) & ~done):
        cursor = BY_NUMBER[int(which[row])].cursor(int(row))
        ends[row] = cursor.move(tokens[row, : lengths[row]]).fill(found[row])
    return found, ends
