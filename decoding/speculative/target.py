"""The two sides of a verification: the target's laws behind the rows of a tree, and what is kept of the tree.

Axis letters: B batch, W tree rows, A kept rows at most, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding.sampling import Sampling, probabilities, process_logits
from decoding.speculative.tree import TokenTree


@struct.dataclass
class Verified:
    """What a step keeps.

    Attributes:
        rows: i32[B, A], the accepted path, row 0 first; 0 from `count` on.
        tokens: i32[B, A], the tokens to emit: those of rows[1:], then one more from the target.
        count: i32[B], how many rows, and how many tokens; 1 to A.
    """

    rows: jax.Array
    tokens: jax.Array
    count: jax.Array


class Target(NamedTuple):
    """The target's side of a step: logits f32[B, W, V] behind every row, and what turns them into laws.

    `keys` and `lengths` (i32[B], new tokens so far) give the randomness: `node` draws the token at place n with the key
    of step n, as plain sampling does, and so writes the same text.
    """

    logits: jax.Array
    sampling: Sampling
    seen: jax.Array
    keys: jax.Array
    lengths: jax.Array

    def law(self, tree: TokenTree, row: jax.Array) -> jax.Array:
        """Returns f32[B, V]: the law of the token behind `row` (i32[B])."""
        return probabilities(*self._behind(tree, row))

    def scores(self, tree: TokenTree, row: jax.Array) -> jax.Array:
        """Returns f32[B, V]: the logits of that law, divided by the temperature, -inf for what may not be drawn."""
        return process_logits(*self._behind(tree, row))

    def _behind(self, tree: TokenTree, row: jax.Array) -> tuple[jax.Array, Sampling, jax.Array]:
        batch = jnp.arange(row.shape[0])
        path = jnp.broadcast_to(tree.ancestors, (row.shape[0], *tree.ancestors.shape[1:]))[batch, row]
        seen = self.seen.at[batch[:, None], tree.tokens].max(path)
        return self.logits[batch, row], self.sampling, seen


def kept(tree: TokenTree, rows: jax.Array, count: jax.Array, last: jax.Array) -> Verified:
    """Returns the path with its tokens and the last token behind them."""
    tokens = jnp.take_along_axis(tree.tokens, jnp.roll(rows, -1, axis=1), axis=1)
    place = jnp.arange(rows.shape[1])[None, :]
    tokens = jnp.where(place < count[:, None] - 1, tokens, 0)
    return Verified(rows, jnp.where(place == count[:, None] - 1, last[:, None], tokens), count)


def normalised(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Returns x [B, V] divided by its sums; `otherwise` (a law, or zeros) for rows that are all zero."""
    total = x.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1.0), otherwise)
