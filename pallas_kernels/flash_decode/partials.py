"""Attention over a part of the keys, and how parts are put together.

For the keys of a part, with scores s_j and the values v_j that row r sees,

    m = max_j s_j        l = sum_j exp(s_j - m)        o = sum_j exp(s_j - m) v_j

so that attention over the part is o / l. Two parts merge to the part of their union, in any order and any grouping. A
part in which a row sees nothing has m = HIDDEN, l = 0, o = 0, and changes nothing that it is merged with.

Everything is float32 but the operands of the two products, which stay in the cache's dtype.

Axis letters: P parts, N batch rows times key/value heads, R rows of queries, S slots, Dh head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Finite, so that a row that sees nothing gives exp(HIDDEN - HIDDEN) and no NaN.
HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


class Partials(NamedTuple):
    """Attention over a part of the keys; any number of leading axes.

    Attributes:
        o: f32[..., R, Dh], the weighted sum of values, not divided by `l`.
        m: f32[..., R], the greatest score seen, HIDDEN if none.
        l: f32[..., R], the sum of exp(score - m) over the keys seen, 0 if none.
    """

    o: jax.Array
    m: jax.Array
    l: jax.Array  # noqa: E741


def merge_partials(parts: Partials) -> Partials:
    """Merges the P parts that lie along the first axis: o [P, ..., R, Dh] to [..., R, Dh], m and l likewise."""
    m = jnp.max(parts.m, axis=0)
    share = jnp.exp(parts.m - m[None])
    return Partials(jnp.sum(share[..., None] * parts.o, axis=0), m, jnp.sum(share * parts.l, axis=0))


def normalize(part: Partials) -> jax.Array:
    """Returns attention itself, o / l: f32[..., R, Dh]; zeros for a row that sees nothing."""
    return part.o / jnp.maximum(part.l, jnp.finfo(jnp.float32).tiny)[..., None]


def cap_scores(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Returns softcap * tanh(scores / softcap), or the scores themselves when there is no cap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def product_precision(dtype: jnp.dtype) -> lax.Precision:
    """Returns what makes a float32 product one of float32 numbers on every device.

    Products of bfloat16 numbers are exact in float32 anyway, and TPU kernels refuse the option for them.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def absorb_block(
    part: Partials,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> Partials:
    """Returns the part with one more block of keys: the step of both kernels, on arrays in fast memory.

    Args:
        part: o [R, Dh], m and l [R, 1].
        q: [R, Dh].
        k: [C, Dh], the block's keys; dead ones may hold anything.
        v: [C, Dh], the block's values; dead ones must be finite.
        visible: bool[R, C].
        scale: factor of the scores.
        softcap: cap of the scores, or None.
    """
    precision = product_precision(q.dtype)
    scores = lax.dot_general(q, k, (((1,), (1,)), ((), ())), precision, jnp.float32) * scale
    scores = jnp.where(visible, cap_scores(scores, softcap), HIDDEN)
    m = jnp.maximum(part.m, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - m), 0.0)
    added = lax.dot_general(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), precision, jnp.float32)
    keep = jnp.exp(part.m - m)
    return Partials(keep * part.o + added, m, keep * part.l + jnp.sum(weights, axis=1, keepdims=True))
