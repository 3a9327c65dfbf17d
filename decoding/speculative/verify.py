"""Which of the drafted tokens stay, and which token follows them: the one verifier of every drafter.

Greedy rows keep what plain greedy decoding would have written. Rows that sample keep the target's law whatever the
draft was, if the mode fits the way in which siblings were chosen:

    node       chosen by any rule that looks at no randomness of this step: one draw from the target per visited row
    rrs_wor    drawn without replacement from `laws` (recursive rejection; RSD 2402.14160, Sequoia 2402.12374)
    rrs_iid    drawn independently from `laws` (multi-round rejection; SpecInfer 2305.09781)
    point      as `node`, by rejection of one token after the other
    traversal  drawn without replacement, verified from the leaves up (2505.12398; on a chain: block verification,
               2403.10444)

A function in place of a mode is a lossy method's own rule, for greedy rows too.

On a chain, rrs_wor and rrs_iid are speculative sampling (2211.17192, 2302.01318).

Axis letters: B batch, W tree rows, P rows with laws, A kept rows at most, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from decoding.sampling import draw, likeliest, step_keys
from decoding.speculative.target import Target, Verified, kept, normalised
from decoding.speculative.traversal import traversal
from decoding.speculative.tree import TokenTree

Rule = Callable[[TokenTree, Target, int], Verified]
Mode = Literal["node", "rrs_wor", "rrs_iid", "point", "traversal"] | Rule


def verify(mode: Mode, tree: TokenTree, target: Target, most: int) -> Verified:
    """Returns what stays of the tree.

    Args:
        mode: how rows that sample are verified.
        tree: the proposal.
        target: the target's logits and settings.
        most: A, one more than the deepest row's depth.
    """
    tree = tree.replace(parent=jnp.where(tree.tokens < 0, -1, tree.parent))  # rows without a token are dead here
    if callable(mode):
        return mode(tree, target, most)
    plain = jnp.all(target.sampling.temperature == 0) & jnp.all(target.sampling.repetition_penalty == 1)
    sampled = {"node": _node, "traversal": traversal}.get(mode, functools.partial(_recursive, mode))
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

    def trial(i, carry, tried):
        row, r, q, rows, count = carry
        token = tree.tokens[:, i]
        uniform = jax.vmap(jax.random.uniform)(jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        q_token = q[index, token]
        accepted = tried & (uniform * q_token < r[index, token]) & (q_token > 0)
        rejected = tried & ~accepted & (q_token > 0)
        left, without = _rejected(mode, r, q, token)
        r, q = jnp.where(rejected[:, None], left, r), jnp.where(rejected[:, None], without, q)
        row = jnp.where(accepted, i, row)
        rows = jnp.where(accepted[:, None] & (jnp.arange(most)[None, :] == count[:, None]), i, rows)
        r, q = jax.lax.cond(
            accepted.any(),
            lambda: (
                jnp.where(accepted[:, None], target.law(tree, row), r),
                jnp.where(accepted[:, None], _law_of_children(mode, tree, row, q), q),
            ),
            lambda: (r, q),
        )
        return row, r, q, rows, count + accepted.astype(jnp.int32)

    def step(carry, i):
        tried = tree.parent[:, i] == carry[0]
        return jax.lax.cond(tried.any(), lambda: trial(i, carry, tried), lambda: carry), None

    root = jnp.zeros((batch,), jnp.int32)
    p = target.law(tree, root)
    start = (root, p, _law_of_children(mode, tree, root, p), jnp.zeros((batch, most), jnp.int32), root + 1)
    (_, r, _, rows, count), _ = jax.lax.scan(step, start, jnp.arange(1, width))
    last = draw(jnp.log(r), jax.vmap(jax.random.fold_in, (0, None))(keys, 0))
    return kept(tree, rows, count, last)


def _law_of_children(mode: Mode, tree: TokenTree, row: jax.Array, like: jax.Array) -> jax.Array:
    """Returns f32[B, V]: the law that the first child of each row was drawn from."""
    return jnp.ones_like(like) if mode == "point" else tree.law_behind(row)  # `point`: each child is its own law


def _rejected(mode: Mode, r: jax.Array, q: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the residual r, and the next sibling's law q, where `token` i32[B] was rejected; f32[B, V] both."""
    index = jnp.arange(len(token))
    left = r.at[index, token].set(0.0) if mode == "point" else jnp.maximum(r - q, 0.0)
    if mode == "rrs_wor":
        without = q.at[index, token].set(0.0)
        q = normalised(without, without)
    return normalised(left, r), q
