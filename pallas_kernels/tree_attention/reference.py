"""Tree attention as one dense softmax: what it means, and what the merged form is compared with and timed against.

Axis letters as in `tree_attention`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.flash_decode.partials import cap_scores, product_precision


def tree_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tree_k: jax.Array,
    tree_v: jax.Array,
    lengths: jax.Array,
    ancestors: jax.Array,
    *,
    depth: jax.Array,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Returns [B, T, H, Dh] by the definition, with a mask over all S + W keys; for the arguments see `tree_attention`.

    Every row of the tree must see at least one key.
    """
    (batch, num_new), width, num_slots = q.shape[:2], ancestors.shape[-1], k.shape[2]
    slots = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), (batch, num_slots))
    tree_positions = lengths[:, None] + depth
    positions = jnp.concatenate([slots, tree_positions], axis=1)[:, None, :]
    committed = jnp.broadcast_to((slots < lengths[:, None])[:, None, :], (batch, num_new, num_slots))
    visible = jnp.concatenate([committed, jnp.broadcast_to(ancestors, (batch, num_new, width))], axis=2)
    if window is not None:
        visible &= positions > tree_positions[:, width - num_new :, None] - window
    keys, values = jnp.concatenate([k, tree_k], axis=2), jnp.concatenate([v, tree_v], axis=2)
    grouped = rearrange(q, "b t (k g) d -> b k g t d", k=k.shape[1])
    options = {"precision": product_precision(q.dtype), "preferred_element_type": jnp.float32}
    scores = cap_scores(jnp.einsum("bkgtd,bksd->bkgts", grouped, keys, **options) * scale, softcap)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(values.dtype), values, **options)
    return rearrange(out, "b k g t d -> b t (k g) d").astype(q.dtype)
