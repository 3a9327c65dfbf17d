"""Grammars over token trees: drafted tokens that leave a row's grammar are taken out before the target reads any, and
what may follow each of the others is known for the verification, so that drafts change nothing in what is written.

Axis letters: B batch, W tree rows, A tokens that a step emits at most, V vocabulary, X words of a bitmask.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding.grammar.bitmask import mask_logits, num_words
from decoding.grammar.grammar import BY_NUMBER
from decoding.grammar.rows import Constraint
from decoding.speculative.tree import TokenTree
from decoding.state import DecodeState


class Masks(NamedTuple):
    """What may come behind the rows of a tree: u32[B, W, X] tokens, and bool[B, W], whether the text may end there."""

    words: jax.Array
    ends: jax.Array

    def first(self, width: int) -> "Masks":
        """Returns those of the first `width` rows."""
        return Masks(self.words[:, :width], self.ends[:, :width])

    def apply(self, logits: jax.Array, stop_tokens: tuple[int, ...]) -> jax.Array:
        """Returns logits f32[B, W, V] with -inf for what may not come."""
        flat = (x.reshape(-1, *x.shape[2:]) for x in (logits, self.words, self.ends))
        return mask_logits(*flat, stop_tokens).reshape(logits.shape)


def inside(
    constraint: Constraint, state: DecodeState, tree: TokenTree, depth: int, vocab: int, stop_tokens: tuple[int, ...]
) -> tuple[Masks, TokenTree, jax.Array]:
    """Takes what leaves the grammars out of a tree.

    Args:
        constraint: where the rows of the batch stand.
        state: their texts.
        tree: the proposal.
        depth: of its deepest row, at most.
        vocab: V.
        stop_tokens: ids that end a row; drafted where a text may end, nothing comes behind them.

    Returns:
        (the masks, the tree with dead rows in place of what is out, i32[B]: how many rows that are).
    """
    batch, width = tree.tokens.shape
    parent, depths = (jnp.broadcast_to(x, (batch, width)) for x in (tree.parent, tree.depth))
    is_stop = jnp.isin(tree.tokens, jnp.asarray(stop_tokens, jnp.int32))
    is_stop = is_stop.at[:, 0].set(False)
    if constraint.tables is None:
        shapes = (
            jax.ShapeDtypeStruct((batch, width, num_words(vocab)), jnp.uint32),
            *(jax.ShapeDtypeStruct((batch, width), jnp.bool_) for _ in range(2)),
        )
        inputs = (constraint.which, state.tokens, state.lengths, state.done, tree.tokens, parent, is_stop)
        words, ends, alive = jax.pure_callback(functools.partial(_ask, words=num_words(vocab)), shapes, *inputs)
    else:
        words, ends, alive = _look_up(constraint, tree.tokens, parent, depths, is_stop, depth)
    live = parent >= 0
    kept = alive & live
    lost = (live & ~kept).sum(axis=1, dtype=jnp.int32)
    return Masks(words, ends), tree.replace(parent=jnp.where(kept, parent, -1)), lost


def along(constraint: Constraint, tokens: jax.Array, count: jax.Array) -> Constraint:
    """Returns the constraint behind the first `count` (i32[B]) of tokens i32[B, A]."""
    for place in range(tokens.shape[1]):
        constraint = constraint.after(tokens[:, place], count <= place)
    return constraint


def _look_up(
    constraint: Constraint, tokens: jax.Array, parent: jax.Array, depths: jax.Array, is_stop: jax.Array, depth: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (words, ends, bool[B, W] rows inside the grammar) by the tables, one level of the tree after another."""
    tables, above = constraint.tables, jnp.maximum(parent, 0)
    classes = tables.classes[constraint.which[:, None], tokens]
    states = jnp.broadcast_to(constraint.state[:, None], tokens.shape)
    alive = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :] == 0, tokens.shape)
    going = alive  # inside, and not at an end

    def level(number: jax.Array, carry: Any) -> Any:
        states, alive, going = carry
        before = jnp.take_along_axis(states, above, axis=1)
        there = tables.next[before, classes]
        ends = tables.accepting[before] | (tables.words[before] == 0).all(axis=-1)
        fits = jnp.take_along_axis(going, above, axis=1) & (parent >= 0) & jnp.where(is_stop, ends, there >= 0)
        here = depths == number
        states = jnp.where(here & fits & ~is_stop, there, states)
        return states, jnp.where(here, fits, alive), jnp.where(here, fits & ~is_stop, going)

    states, alive, _ = jax.lax.fori_loop(1, depth + 1, level, (states, alive, going))
    return tables.words[states], tables.accepting[states], alive


def _ask(
    which: Any, tokens: Any, lengths: Any, done: Any, drafted: Any, parent: Any, is_stop: Any, *, words: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what `_look_up` does, from the parsing engine; a pure function of its arguments."""
    inputs = (np.asarray(x) for x in (which, tokens, lengths, done, drafted, parent, is_stop))
    which, tokens, lengths, done, drafted, parent, is_stop = inputs
    found = np.full((*drafted.shape, words), 0xFFFFFFFF, np.uint32)
    ends = np.ones(drafted.shape, bool)
    alive = np.zeros(drafted.shape, bool)
    for row in range(len(which)):
        if which[row] < 0 or done[row]:
            alive[row] = _reached(parent[row], is_stop[row])
        else:
            text = tokens[row, : lengths[row]].tolist()
            cursor = BY_NUMBER[int(which[row])].cursor(row)
            _descend(cursor, text, drafted[row], parent[row], is_stop[row], found[row], ends[row], alive[row])
    return found, ends, alive


def _reached(parent: np.ndarray, is_stop: np.ndarray) -> np.ndarray:
    """Returns bool[W]: the rows whose ancestors are live, and no stop tokens."""
    alive = np.arange(len(parent)) == 0
    for row in range(1, len(parent)):
        alive[row] = parent[row] >= 0 and alive[parent[row]] and not is_stop[parent[row]]
    return alive


def _descend(
    cursor: Any,
    text: list[int],
    drafted: Sequence[int],
    parent: Sequence[int],
    is_stop: Sequence[bool],
    found: np.ndarray,
    ends: np.ndarray,
    alive: np.ndarray,
) -> None:
    """Fills in found u32[W, X], ends and alive bool[W] for one tree behind a text of the grammar."""
    paths: dict[int, list[int]] = {0: text}
    for row in range(len(drafted)):
        if row:
            above, token = int(parent[row]), int(drafted[row])
            if above not in paths:
                continue
            if is_stop[row]:
                alive[row] = ends[above] or not found[above].any()
                continue
            if not found[above][token // 32] >> np.uint32(token % 32) & 1:
                continue
            paths[row] = [*paths[above], token]
        alive[row] = True
        ends[row] = cursor.move(np.asarray(paths[row], np.int64)).fill(found[row])
