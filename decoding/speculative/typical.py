"""Typical acceptance: a guess stays where the target finds it likely enough for how unsure it is. Lossy.

Source: "Medusa" (2401.10774), section 2.3.1 and equation 1, after truncation sampling (2210.15191). With p the target's
law behind a row's parent, at the call's sampling settings, and H its entropy in nats, a guess x stays where

    p(x) > min(epsilon, delta exp(-H)),    delta = sqrt(epsilon)

and its parent stayed. Of the paths that stay the longest wins, and of the longest that of the greatest likelihood. The
token behind it is the target's likeliest, so that a step emits one token at least and draws nothing: a seed changes
nothing. Neither the greedy text nor the law of sampling is kept; at temperature 0 the law is one token alone, and the
rule is that of greedy decoding.

Axis letters: B batch, W tree rows, A kept rows at most, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp

from decoding.sampling import likeliest
from decoding.speculative.target import Target, Verified, kept
from decoding.speculative.tree import TokenTree
from decoding.speculative.verify import Rule


def typical(epsilon: float) -> Rule:
    """Returns the rule, for `decoding.speculative.verify.verify`; `epsilon` lies between 0 and 1."""
    return functools.partial(_typical, epsilon)


def threshold(law: jax.Array, epsilon: float) -> jax.Array:
    """Returns f32[...], what a token's probability must exceed under laws f32[..., V]."""
    entropy = -jnp.sum(jnp.where(law > 0, law * jnp.log(jnp.where(law > 0, law, 1.0)), 0.0), axis=-1)
    return jnp.minimum(epsilon, math.sqrt(epsilon) * jnp.exp(-entropy))


def _typical(epsilon: float, tree: TokenTree, target: Target, most: int) -> Verified:
    batch, width = tree.tokens.shape
    index, places = jnp.arange(batch)[:, None], jnp.arange(width)[None, :]
    parent, depth = (jnp.broadcast_to(x, (batch, width)) for x in (tree.parent, tree.depth))
    chance, least = _behind_parents(epsilon, tree, parent, target)
    stays = (places == 0) | (parent >= 0) & (chance > least)
    ancestors = jnp.broadcast_to(tree.ancestors, (batch, width, width))
    alive = ~(ancestors & ~stays[:, None, :]).any(axis=-1)
    depth = jnp.where(alive, depth, -1)
    log_chance = jnp.log(jnp.where((places > 0) & (chance > 0), chance, 1.0))
    likelihood = jnp.where(ancestors, log_chance[:, None, :], 0.0).sum(axis=-1)
    count = depth.max(axis=1) + 1
    end = jnp.argmax(jnp.where(depth + 1 == count[:, None], likelihood, -jnp.inf), axis=1)
    on_path = ancestors[index[:, 0], end]
    steps = jnp.where(on_path, depth, -1)[:, None, :] == jnp.arange(most)[None, :, None]
    rows = jnp.argmax(steps, axis=-1).astype(jnp.int32)
    return kept(tree, rows, count.astype(jnp.int32), likeliest(target.law(tree, end)))


def _behind_parents(epsilon: float, tree: TokenTree, parent: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Returns each row's probability behind its parent and what it must exceed, f32[B, W] both; 0 for row 0 and for
    dead rows. One law is held at a time.
    """
    none = jnp.zeros(tree.tokens.shape, jnp.float32)

    def add(row: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chance, least = found
        children = parent == row
        law = target.law(tree, jnp.full((len(parent),), row))
        own = jnp.take_along_axis(law, tree.tokens, axis=1)
        return jnp.where(children, own, chance), jnp.where(children, threshold(law, epsilon)[:, None], least)

    def step(row: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond((parent == row).any(), lambda: add(row, found), lambda: found)

    return jax.lax.fori_loop(0, tree.tokens.shape[1], step, (none, none))
