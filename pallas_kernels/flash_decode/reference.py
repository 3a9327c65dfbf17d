"""Flash decoding in plain jnp: what it means, and the form that XLA compiles.

Axis letters: N batch rows times key/value heads, R rows of queries, S slots, Dh head width; X slots of a list, of which
each key/value head has one or several: N lists for M heads.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_decode.partials import HIDDEN, Partials, cap_scores, product_precision


def flash_decode_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    first: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
) -> Partials:
    """Returns the part of all S slots.

    Args:
        q: [N, R, Dh].
        k: [N, S, Dh].
        v: [N, S, Dh]; dead slots must be finite.
        lengths: i32[N]; slots from here on are dead.
        first: i32[N, R], the first slot that each row sees; None for 0.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
    """
    slots = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    visible = slots < lengths[:, None, None]
    if first is not None:
        visible &= slots >= first[:, :, None]
    return masked_partials(q, k, v, visible, scale=scale, softcap=softcap)


def listed_partials(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    first: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> Partials:
    """Returns the part of listed slots, which alone are read.

    Args:
        q: [N, R, Dh].
        k: [M, S, Dh], M a divisor of N; list n reads head n // (N / M).
        v: [M, S, Dh], finite.
        slots: i32[N, X], below S, none twice; a negative one stands for none.
        first: i32[N, R], not negative: the first slot that each row sees.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
    """
    visible = slots[:, None, :] >= first[:, :, None]
    return masked_partials(q, gather_slots(k, slots), gather_slots(v, slots), visible, scale=scale, softcap=softcap)


def gather_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns [N, X, Dh]: list n of slots i32[N, X] of head n // (N / M) of x [M, S, Dh]; slot 0 for negative ones.

    Rows are taken from one long list, since a gather along the axis S may copy the heads first.
    """
    heads, num_slots, head_dim = x.shape
    begin = jnp.arange(len(slots), dtype=jnp.int32) // (len(slots) // heads) * num_slots
    return x.reshape(-1, head_dim).at[begin[:, None] + jnp.maximum(slots, 0)].get(mode="promise_in_bounds")


def masked_partials(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, *, scale: float, softcap: float | None
) -> Partials:
    """Returns the part of the slots that `visible` (bool[N, R or 1, S]) shows; see `flash_decode_reference`."""
    precision = product_precision(q.dtype)
    scores = jnp.einsum("nrd,nsd->nrs", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible, cap_scores(scores, softcap), HIDDEN)
    m = jnp.max(scores, axis=-1)
    weights = jnp.where(visible, jnp.exp(scores - m[..., None]), 0.0)
    o = jnp.einsum("nrs,nsd->nrd", weights.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32)
    return Partials(o, m, jnp.sum(weights, axis=-1))
