"""Flash decoding in plain jnp: what it means, and the form that XLA compiles.

Axis letters: N batch rows times key/value heads, R rows of queries, S slots, Dh head width; X slots of a list, of which
each key/value head has one or several, or none: N lists for M heads.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
    heads: np.ndarray,
    visible: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> Partials:
    """Returns the part of listed slots, which alone are read.

    Args:
        q: [N, R, Dh].
        k: [M, S, Dh].
        v: [M, S, Dh], finite.
        slots: i32[N, X], none twice unless hidden.
        heads: i32[N], the head that each list reads.
        visible: bool[N, R or 1, X], what is seen of them.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
    """
    keys, values = gather_slots(k, slots, heads), gather_slots(v, slots, heads)
    return masked_partials(q, keys, values, visible, scale=scale, softcap=softcap)


def gather_slots(x: jax.Array, slots: jax.Array, heads: np.ndarray) -> jax.Array:
    """Returns [N, X, Y]: the slots i32[N, X] of x [M, S, Y], list n from head heads[n]; beyond S the nearest slot.

    Rows are taken from one long list, since a gather along the axis S may copy the heads first.
    """
    num_slots = x.shape[1]
    rows = (heads * num_slots)[:, None] + jnp.clip(slots, 0, num_slots - 1)
    return x.reshape(-1, x.shape[2]).at[rows].get(mode="promise_in_bounds")


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
