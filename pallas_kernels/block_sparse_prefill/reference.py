"""Block-sparse prefill in plain jnp: what it means, and the form that XLA compiles.

Axis letters as in `block_sparse_prefill`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from pallas_kernels.block_sparse_prefill.lists import HeadBlocks
from pallas_kernels.flash_decode.partials import cap_scores, product_precision


def block_sparse_prefill_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    heads: Sequence[HeadBlocks],
    *,
    block: int,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Returns [B, T, H, Dh]: one block of queries after another, each against all slots under a mask.

    Args:
        q: [B, T, H, Dh].
        k: [B, K, S, Dh], S at least T.
        v: [B, K, S, Dh], finite.
        lengths: i32[B], 0 to T.
        heads: one per key/value head.
        block: C, positions of a block.
        scale: factor of the scores.
        softcap: cap of the scores, or None.
    """
    num_positions = q.shape[1]
    sink, local = (jnp.asarray(x, jnp.int32)[None, :, None, None] for x in zip(*heads, strict=True))
    slots = jnp.arange(k.shape[2], dtype=jnp.int32)[None, None, None, :]
    grouped = jnp.pad(q, ((0, 0), (0, -num_positions % block), (0, 0), (0, 0)))
    grouped = rearrange(grouped, "b (i c) (k g) d -> i b k g c d", c=block, k=k.shape[1])
    options = {"precision": product_precision(q.dtype), "preferred_element_type": jnp.float32}

    def of_block(index_and_queries: tuple[jax.Array, jax.Array]) -> jax.Array:
        index, queries = index_and_queries
        positions = (index * block + jnp.arange(block, dtype=jnp.int32))[None, None, :, None]
        listed = (slots // block < sink) | (slots // block > index - local)
        visible = listed & (slots <= positions) & (positions < lengths[:, None, None, None])
        scores = cap_scores(jnp.einsum("bkgcd,bksd->bkgcs", queries, k, **options) * scale, softcap)
        weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -jnp.inf), axis=-1)
        weights = jnp.where(visible[:, :, None], weights, 0.0).astype(v.dtype)
        return jnp.einsum("bkgcs,bksd->bkgcd", weights, v, **options).astype(q.dtype)

    out = lax.map(of_block, (jnp.arange(len(grouped), dtype=jnp.int32), grouped))
    return rearrange(out, "i b k g c d -> b (i c) (k g) d")[:, :num_positions]
