"""Which of the drafted tokens stay, and which token follows them: the one verifier of every drafter.

Greedy rows keep what plain greedy decoding would have written. Rows that sample keep the target's law whatever the
draft was, if the mode fits the way in which siblings were chosen:

    node       chosen by any rule that looks at no randomness of this step: one draw from the target per visited row
    rrs_wor    drawn without replacement from `laws` (recursive rejection; RSD 2402.14160, Sequoia 2402.12374)
    rrs_iid    drawn independently from `laws` (multi-round rejection; SpecInfer 2305.09781)
    point      as `node`, by rejection of one token after the other
    traversal  drawn without replacement, verified from the leaves up (2505.12398; on a chain: block verification,
               2403.10444)

On a chain, rrs_wor and rrs_iid are speculative sampling (2211.17192, 2302.01318).

Axis letters: B batch, W tree rows, P rows with laws, A kept rows at most, V vocabulary.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from decoding.sampling import Sampling, draw, likeliest, probabilities, step_keys
from decoding.speculative.tree import TokenTree

Mode = Literal["node", "rrs_wor", "rrs_iid", "point", "traversal"]


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
        batch = jnp.arange(row.shape[0])
        path = jnp.broadcast_to(tree.ancestors, (row.shape[0], *tree.ancestors.shape[1:]))[batch, row]
        seen = self.seen.at[batch[:, None], tree.tokens].max(path)
        return probabilities(self.logits[batch, row], self.sampling, seen)


def verify(mode: Mode, tree: TokenTree, target: Target, most: int) -> Verified:
    """Returns what stays of the tree.

    Args:
        mode: how rows that sample are verified.
        tree: the proposal.
        target: the target's logits and settings.
        most: A, one more than the deepest row's depth.
    """
    batch, width = tree.tokens.shape
    tree = tree.replace(parent=jnp.broadcast_to(tree.parent, (batch, width)))
    plain = jnp.all(target.sampling.temperature == 0) & jnp.all(target.sampling.repetition_penalty == 1)
    sampled = {"node": _node, "traversal": _traversal}.get(mode)
    if sampled is None:
        return jax.lax.cond(plain, lambda: _greedy(tree, target, most), lambda: _recursive(mode, tree, target, most))
    return jax.lax.cond(plain, lambda: _greedy(tree, target, most), lambda: sampled(tree, target, most))


def _greedy(tree: TokenTree, target: Target, most: int) -> Verified:
    best = likeliest(target.logits)
    rows = jnp.arange(best.shape[0])
    return _walk(tree, most, lambda row, step, alive: best[rows, row])


def _node(tree: TokenTree, target: Target, most: int) -> Verified:
    def choose(row, step, alive):
        keys = step_keys(target.keys, target.lengths + step)
        return jax.lax.cond(
            alive.any(), lambda: draw(jnp.log(target.law(tree, row)), keys), lambda: jnp.zeros_like(row)
        )

    return _walk(tree, most, choose)


def _walk(tree: TokenTree, most: int, choose) -> Verified:
    """Goes down the tree as long as a child carries the token that the target chose."""

    def step(carry, step):
        row, alive = carry
        token = choose(row, step, alive)
        matches = (tree.parent == row[:, None]) & (tree.tokens == token[:, None])
        child = jnp.argmax(matches, axis=1).astype(jnp.int32)
        emitted = (jnp.where(alive, row, 0), jnp.where(alive, token, 0), alive)
        return (child, alive & matches.any(axis=1)), emitted

    batch = tree.tokens.shape[0]
    start = (jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), bool))
    _, (rows, tokens, alive) = jax.lax.scan(step, start, jnp.arange(most))
    return Verified(rows.T, tokens.T, alive.sum(axis=0, dtype=jnp.int32))


def _recursive(mode: Mode, tree: TokenTree, target: Target, most: int) -> Verified:
    """Recursive rejection sampling as one scan over rows (2402.14160, section 3; 2305.09781, algorithm 2).

    Carries the accepted row, the residual r of the target's law there, and the law q that its next child was drawn
    from.
    """
    batch, width = tree.tokens.shape
    index = jnp.arange(batch)
    keys = step_keys(target.keys, target.lengths)

    def law_of_children(row):
        if mode == "point":
            return jnp.ones((batch, target.logits.shape[-1]), jnp.float32)  # each child is its own law
        law = tree.laws[index, jnp.minimum(row, tree.laws.shape[1] - 1)]
        return jnp.where((row < tree.laws.shape[1])[:, None], law, 0.0)

    def trial(i, carry, tried):
        row, r, q, rows, count = carry
        token = tree.tokens[:, i]
        uniform = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        q_token = q[index, token]
        accepted = tried & (uniform * q_token < r[index, token]) & (q_token > 0)
        rejected = tried & ~accepted & (q_token > 0)
        without = q.at[index, token].set(0.0)
        left = r.at[index, token].set(0.0) if mode == "point" else jnp.maximum(r - q, 0.0)
        r = jnp.where(rejected[:, None], normalised(left, r), r)
        if mode == "rrs_wor":
            q = jnp.where(rejected[:, None], normalised(without, without), q)
        row = jnp.where(accepted, i, row)
        rows = jnp.where(accepted[:, None] & (jnp.arange(most)[None, :] == count[:, None]), i, rows)
        r, q = jax.lax.cond(
            accepted.any(),
            lambda: (
                jnp.where(accepted[:, None], target.law(tree, row), r),
                jnp.where(accepted[:, None], law_of_children(row), q),
            ),
            lambda: (r, q),
        )
        return row, r, q, rows, count + accepted.astype(jnp.int32)

    def step(carry, i):
        tried = tree.parent[:, i] == carry[0]
        return jax.lax.cond(tried.any(), lambda: trial(i, carry, tried), lambda: carry), None

    root = jnp.zeros((batch,), jnp.int32)
    start = (root, target.law(tree, root), law_of_children(root), jnp.zeros((batch, most), jnp.int32), root + 1)
    (_, r, _, rows, count), _ = jax.lax.scan(step, start, jnp.arange(1, width))
    last = draw(jnp.log(r), jax.vmap(jax.random.fold_in, (0, None))(keys, 0))
    return _finish(tree, rows, count, last)


def _traversal(tree: TokenTree, target: Target, most: int) -> Verified:
    """Traversal verification (2505.12398, algorithm 2) as one loop over a stack of the current path.

    At each depth of the path the stack has the target's residual p, the draft's q, and the weight w with which the path
    so far may be kept; a row that fails hands its parent the residual of both.
    """
    batch, width = tree.tokens.shape
    vocab = target.logits.shape[-1]
    index = jnp.arange(batch)
    keys = step_keys(target.keys, target.lengths)

    def push(stack, level, row, weight, where):
        p, q, w, rows = stack
        law = jnp.minimum(row, tree.laws.shape[1] - 1)
        q_row = jnp.where((row < tree.laws.shape[1])[:, None], tree.laws[index, law], 0.0)
        put = where[:, None] & (jnp.arange(most)[None, :] == level[:, None])
        return (
            jnp.where(put[..., None], target.law(tree, row)[:, None], p),
            jnp.where(put[..., None], q_row[:, None], q),
            jnp.where(put, weight[:, None], w),
            jnp.where(put, row[:, None], rows),
        )

    def step(carry):
        (p, q, w, rows), level, untried, done, turn = carry
        row, p_here, q_here, w_here = rows[index, level], p[index, level], q[index, level], w[index, level]
        children = untried & (tree.parent == row[:, None])
        child = jnp.argmax(children, axis=1).astype(jnp.int32)
        token = tree.tokens[index, child]
        q_token = q_here[index, token]
        down = ~done & children.any(axis=1)
        untried = untried & ~(down[:, None] & (jnp.arange(width)[None, :] == child[:, None]))
        down &= q_token > 0
        leaf = ~done & ~children.any(axis=1)
        uniform = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in, (0, None))(keys, turn))
        done = done | (leaf & ((uniform < w_here) | (level == 0)))
        up = leaf & ~done
        # the failed child's parent: (w p - q)+ and its weight; then q without the child's token
        above = jnp.maximum(level - 1, 0)
        p_up, q_up, w_up = p[index, above], q[index, above], w[index, above]
        rest = jnp.maximum(w_up[:, None] * p_up - q_up, 0.0)
        mass = rest.sum(axis=-1)
        room = mass + (1 - w_up)  # in this order: a small mass must not be lost beside the 1
        w_new = jnp.where(room > 0, mass / jnp.maximum(room, 1e-30), 1.0)
        q_left = q_up.at[index, tree.tokens[index, row]].set(0.0)
        put = up[:, None] & (jnp.arange(most)[None, :] == above[:, None])
        p = jnp.where(put[..., None], normalised(rest, p_up)[:, None], p)
        q = jnp.where(put[..., None], normalised(q_left, q_left)[:, None], q)
        w = jnp.where(put, w_new[:, None], w)
        ratio = w_here * p_here[index, token] / jnp.where(q_token > 0, q_token, 1.0)
        stack = push((p, q, w, rows), level + 1, child, jnp.minimum(ratio, 1.0), down)
        return stack, level + down.astype(jnp.int32) - up.astype(jnp.int32), untried, done, turn + 1

    zero = jnp.zeros((batch,), jnp.int32)
    empty = jnp.zeros((batch, most, vocab), jnp.float32)
    stack = (empty, empty, jnp.zeros((batch, most), jnp.float32), jnp.zeros((batch, most), jnp.int32))
    stack = push(stack, zero, zero, jnp.ones((batch,), jnp.float32), zero == 0)
    start = (stack, zero, tree.parent >= 0, zero != 0, jnp.ones((), jnp.int32))
    (p, _, _, rows), level, *_ = jax.lax.while_loop(lambda carry: ~carry[3].all(), step, start)
    last = draw(jnp.log(p[index, level]), jax.vmap(jax.random.fold_in, (0, None))(keys, 0))
    return _finish(tree, jnp.where(jnp.arange(most)[None, :] <= level[:, None], rows, 0), level + 1, last)


def _finish(tree: TokenTree, rows: jax.Array, count: jax.Array, last: jax.Array) -> Verified:
    """Returns the path with its tokens and the last token behind them."""
    tokens = jnp.take_along_axis(tree.tokens, jnp.roll(rows, -1, axis=1), axis=1)
    place = jnp.arange(rows.shape[1])[None, :]
    tokens = jnp.where(place < count[:, None] - 1, tokens, 0)
    return Verified(rows, jnp.where(place == count[:, None] - 1, last[:, None], tokens), count)


def normalised(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Returns x [B, V] divided by its sums; `otherwise` (a law, or zeros) for rows that are all zero."""
    total = x.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1.0), otherwise)
