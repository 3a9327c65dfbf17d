"""Traversal verification: from the leaves of a token tree up (2505.12398, algorithm 2).

On a chain it is block verification (2403.10444). Needs siblings that were drawn without replacement.

Axis letters: B batch, W tree rows, A kept rows at most, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from decoding.sampling import draw, step_keys
from decoding.speculative.target import Target, Verified, kept, normalised
from decoding.speculative.tree import TokenTree


class Stack(NamedTuple):
    """The path under test, one entry per depth.

    Attributes:
        p: f32[B, A, V], what is left of the target's law behind each row.
        q: f32[B, A, V], what is left of the draft's law there.
        weight: f32[B, A], the probability with which the path up to each row is kept.
        rows: i32[B, A].
    """

    p: jax.Array
    q: jax.Array
    weight: jax.Array
    rows: jax.Array

    def at(self, level: jax.Array) -> "Stack":
        """Returns the entries at `level` (i32[B]), without the axis A."""
        index = jnp.arange(len(level))
        return Stack(*(x[index, level] for x in self))

    def put(self, level: jax.Array, entry: "Stack", where: jax.Array) -> "Stack":
        """Returns the stack with `entry` at `level`, in the batch rows `where` (bool[B])."""
        place = where[:, None] & (jnp.arange(self.weight.shape[1])[None, :] == level[:, None])
        wide = place[..., None]
        p, q = jnp.where(wide, entry.p[:, None], self.p), jnp.where(wide, entry.q[:, None], self.q)
        return Stack(
            p,
            q,
            jnp.where(place, entry.weight[:, None], self.weight),
            jnp.where(place, entry.rows[:, None], self.rows),
        )


def traversal(tree: TokenTree, target: Target, most: int) -> Verified:
    """Returns what stays of the tree; see `decoding.speculative.verify.verify` for the arguments.

    One loop over a stack: each turn goes down to the next untried child, or keeps the path, or gives it up.
    """
    batch = len(tree.tokens)
    index, width = jnp.arange(batch), jnp.arange(tree.tokens.shape[1])[None, :]
    keys = step_keys(target.keys, target.lengths)

    def step(carry):
        stack, level, untried, done, turn = carry
        here = stack.at(level)
        children = untried & (tree.parent == here.rows[:, None])
        child = jnp.argmax(children, axis=1).astype(jnp.int32)
        found = ~done & children.any(axis=1)
        untried = untried & ~(found[:, None] & (width == child[:, None]))
        drawn = here.q[index, tree.tokens[index, child]] > 0  # nothing was left to draw: no trial
        uniform = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in, (0, None))(keys, turn))
        kept_here = ~done & ~children.any(axis=1) & ((uniform < here.weight) | (level == 0))
        up = ~done & ~children.any(axis=1) & ~kept_here
        above = jnp.maximum(level - 1, 0)
        stack = stack.put(above, _given_up(stack.at(above), tree.tokens[index, here.rows]), up)
        down = found & drawn
        stack = stack.put(level + 1, _entered(tree, target, here, child), down)
        level = level + down.astype(jnp.int32) - up.astype(jnp.int32)
        return stack, level, untried, done | kept_here, turn + 1

    root = jnp.zeros((batch,), jnp.int32)
    flat, wide = jnp.zeros((batch, most)), jnp.zeros((batch, most, target.logits.shape[-1]))
    one = jnp.ones((batch,))
    first = Stack(target.law(tree, root), tree.law_behind(root), one, root)
    stack = Stack(wide, wide, flat, flat.astype(jnp.int32)).put(root, first, one > 0)
    start = (stack, root, tree.parent >= 0, root != 0, jnp.ones((), jnp.int32))
    stack, level, *_ = jax.lax.while_loop(lambda carry: ~carry[3].all(), step, start)
    last = draw(jnp.log(stack.at(level).p), jax.vmap(jax.random.fold_in, (0, None))(keys, 0))
    rows = jnp.where(jnp.arange(most)[None, :] <= level[:, None], stack.rows, 0)
    return kept(tree, rows, level + 1, last)


def _entered(tree: TokenTree, target: Target, parent: Stack, child: jax.Array) -> Stack:
    """Returns the entry of a child that is to be tried."""
    index = jnp.arange(len(child))
    token = tree.tokens[index, child]
    q = parent.q[index, token]
    ratio = parent.weight * parent.p[index, token] / jnp.where(q > 0, q, 1.0)
    return Stack(target.law(tree, child), tree.law_behind(child), jnp.minimum(ratio, 1.0), child)


def _given_up(parent: Stack, token: jax.Array) -> Stack:
    """Returns the parent's entry after its child with `token` was given up."""
    rest = jnp.maximum(parent.weight[:, None] * parent.p - parent.q, 0.0)
    mass = rest.sum(axis=-1)
    room = mass + (1 - parent.weight)  # in this order: a small mass must not be lost beside the 1
    weight = jnp.where(room > 0, mass / jnp.maximum(room, 1e-30), 1.0)
    q = parent.q.at[jnp.arange(len(token)), token].set(0.0)
    return Stack(normalised(rest, parent.p), normalised(q, q), weight, parent.rows)
