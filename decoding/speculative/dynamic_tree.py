"""Trees that grow where a head itself expects its guesses to be right, level by level, and are cut to a budget.

Source: "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees" (2406.16858), section 4. A guess is
worth the product of the head's probabilities along its path. Of each level the `beam` rows of greatest worth get `beam`
children each (expansion); of all rows of all levels, whether they got children or not, the `nodes` of greatest worth
are the tree (reranking). No row is worth more than its parent, so that what is kept is a tree; where `beam` is at least
`nodes` it is what best-first search would find.

Which rows a tree has depends on no draw: it is verified as a tree of likeliest children is.

Axis letters: B batch, N candidates, T rows of a level, C children per row, R rows read so far, W tree rows,
V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decoding.sampling import top_tokens
from decoding.speculative.tree import TokenTree, grown


class Level(NamedTuple):
    """Rows of one level that a head is to read.

    Attributes:
        depth: of these rows, from 1 on.
        tokens: i32[B, T].
        parent: i32[B or 1, T]: which row of the level before each follows.
        ancestors: bool[B or 1, T, R]; [i, j] is true when j is i or an ancestor of i, among all rows read so far but
            row 0, these rows last.
        steps: i32[1, R]: the depth of each of those, less 1.
    """

    depth: int
    tokens: jax.Array
    parent: jax.Array
    ancestors: jax.Array
    steps: jax.Array


# (a level to read, or None for row 0, what is carried) -> (logits f32[B, T, V] behind its rows, what is carried on)
Guess = Callable[[Level | None, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a tree grows.

    Attributes:
        nodes: guesses of the tree at most.
        depth: levels.
        beam: rows of a level that get children, and children of each; more than `nodes` would change nothing.
        keep: log-probabilities f32[B, T, C] of children, the likeliest first -> bool, which may enter the tree; it must
            hold for some first ones of them. None: all.
    """

    nodes: int
    depth: int
    beam: int
    keep: Callable[[jax.Array], jax.Array] | None = None

    def children(self, vocab: int) -> int:
        """Returns C."""
        return min(self.beam, self.nodes, vocab)

    def sizes(self, vocab: int) -> list[int]:
        """Returns how many rows of each level get children, row 0 the first level."""
        sizes = [1]
        for _ in range(self.depth - 1):
            sizes.append(min(self.beam, self.nodes, sizes[-1] * self.children(vocab)))
        return sizes

    def width(self, vocab: int) -> int:
        """Returns W."""
        return 1 + min(self.nodes, sum(self.sizes(vocab)) * self.children(vocab))


def best_rows(tree: TokenTree, value: jax.Array, width: int) -> tuple[TokenTree, jax.Array]:
    """Returns the tree of the `width` rows of highest value, and i32[B, W]: which rows they are, in their old order.

    Args:
        tree: a tree of N rows, whose parents and elder siblings are worth no less than a row itself.
        value: f32[B, N]; rows of -inf are left out, and dead rows behind the others stand in their place.
        width: W.
    """
    rows = value.shape[1]
    best = jax.lax.top_k(value, width)[1]
    places = jnp.sort(jnp.where(jnp.take_along_axis(value, best, axis=1) > -jnp.inf, best, rows), axis=1)
    live, places = places < rows, jnp.minimum(places, rows - 1)
    return tree.subtree(places, live), places


def likeliest_children(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the likeliest tokens i32[..., C] of f32[..., V] and their log-probabilities, the likeliest first."""
    tokens = top_tokens(logits, count)
    chosen = jnp.take_along_axis(logits, tokens, axis=-1)
    return tokens, jnp.minimum(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True), 0.0)


def with_level(
    tree: TokenTree, value: jax.Array, rows: jax.Array, tokens: jax.Array, log_chance: jax.Array
) -> tuple[TokenTree, jax.Array]:
    """Returns the candidates with children behind some rows, and the values of all.

    Args:
        tree: the candidates so far.
        value: f32[B, N], theirs.
        rows: i32[B, T], those that get children.
        tokens: i32[B, T, C], the children.
        log_chance: f32[B, T, C], log-probabilities behind their parents; -inf for those that are left out.
    """
    batch, count = len(rows), tokens.shape[2]
    parent = jnp.repeat(rows, count, axis=1)
    worth = jnp.take_along_axis(value, parent, axis=1) + log_chance.reshape(batch, -1)
    depth = jnp.take_along_axis(tree.depth, parent, axis=1) + 1
    more = TokenTree(
        jnp.concatenate([tree.tokens, tokens.reshape(batch, -1)], axis=1),
        jnp.concatenate([tree.parent, parent], axis=1),
        jnp.concatenate([tree.depth, depth], axis=1),
        grown(tree.ancestors, parent),
    )
    return more, jnp.concatenate([value, worth], axis=1)


def dynamic_tree(growth: Growth, last: jax.Array, guess: Guess, carry: Any) -> tuple[TokenTree, jax.Array]:
    """Returns the tree, its live rows first, and the log-value f32[B, W] of each row.

    Args:
        growth: how it grows.
        last: i32[B], the newest tokens.
        guess: asks the head.
        carry: what it starts from.
    """
    batch = len(last)
    zero = jnp.zeros((batch, 1), jnp.int32)
    tree = TokenTree(last[:, None], zero - 1, zero, jnp.ones((batch, 1, 1), bool))
    value, rows, read, steps = jnp.zeros((batch, 1), jnp.float32), zero, zero[:, :0], []
    logits, carry = guess(None, carry)
    vocab = logits.shape[-1]
    sizes, children = growth.sizes(vocab), growth.children(vocab)
    for depth in range(1, growth.depth + 1):
        tokens, log_chance = likeliest_children(logits, children)
        if growth.keep is not None:
            log_chance = jnp.where(growth.keep(log_chance), log_chance, -jnp.inf)
        before = value.shape[1]
        tree, value = with_level(tree, value, rows, tokens, log_chance)
        if depth == growth.depth:
            break
        chosen = jnp.sort(jax.lax.top_k(value[:, before:], sizes[depth])[1], axis=1)
        rows, steps = before + chosen, [*steps, *[depth - 1] * sizes[depth]]
        read = jnp.concatenate([read, rows], axis=1)
        ancestors = jnp.take_along_axis(tree.ancestors, rows[..., None], axis=1)
        ancestors = jnp.take_along_axis(ancestors, read[:, None], axis=2)
        tokens = jnp.take_along_axis(tree.tokens, rows, axis=1)
        level = Level(depth, tokens, chosen // children, ancestors, jnp.asarray(steps, jnp.int32)[None])
        logits, carry = guess(level, carry)
    tree, places = best_rows(tree, value, growth.width(vocab))
    return tree, jnp.take_along_axis(value, places, axis=1)
