"""Attention of rows that guess behind a text and never stay: a few behind a cache, in decoding, and a group of them
behind each token of a text at once, in training.

Axis letters: B batch, T tokens of a row, K rows of a group, P = T*K, S cache slots, H query heads, N key heads,
G = H/N, E head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention import (
    TreeRows,
    attention_output,
    attention_scores,
    masked_attention,
    scaled,
    visible_softmax,
)
from models.kernels import PRECISION


class Groups(NamedTuple):
    """The context of `group_attend`: i32[B, T] positions and segments of the text, bool[K, K] which pseudo state (the
    second axis) another one sees.
    """

    positions: jax.Array
    segments: jax.Array
    sees: np.ndarray


def group_attend(q, k, v, cache, ctx: Groups, *, config, layer):
    """Attention of a text and of pseudo rows behind each of its tokens, T + P rows.

    The text sees itself alone, a pseudo row the text up to its token and its own group. See `models.attention.Attend`
    for the arguments.
    """
    length, count = ctx.positions.shape[1], ctx.sees.shape[0]
    keys, values = jnp.swapaxes(k[:, :length], 1, 2), jnp.swapaxes(v[:, :length], 1, 2)
    visible = ctx.segments[:, :, None] == ctx.segments[:, None, :]
    visible &= jnp.tri(length, dtype=bool)[None]
    gap = ctx.positions[:, :, None] - ctx.positions[:, None, :]
    near = visible if config.window is None else visible & (gap < config.window)
    text = masked_attention(q[:, :length], keys, values, near, config)
    steps = jnp.arange(1, count + 1)
    behind = jnp.broadcast_to(visible[:, :, None, :], (*visible.shape[:2], count, length))
    sees = jnp.asarray(ctx.sees)
    if config.window is not None:
        behind &= (gap[:, :, None, :] + steps[None, None, :, None]) < config.window
        sees &= (steps[:, None] - steps[None, :]) < config.window
    own_q, own_k, own_v = (
        x[:, length:].reshape(len(x), length, count, config.num_kv_heads, -1, x.shape[-1]) for x in (q, k, v)
    )
    context = attention_scores(q[:, length:], keys, config)  # [B, N, G, P, T]
    group = jnp.einsum("btkngd,btjnd->bngtkj", own_q, own_k[..., 0, :], precision=PRECISION)
    group = scaled(group.astype(jnp.float32), config).reshape(*context.shape[:-1], count)
    shown = jnp.broadcast_to(sees[None, None], (*behind.shape[:3], count))
    shown = jnp.concatenate([behind, shown], axis=-1).reshape(len(q), 1, 1, length * count, length + count)
    weights = visible_softmax(jnp.concatenate([context, group], axis=-1), shown).astype(v.dtype)
    out = jnp.einsum("bngps,bnsd->bpngd", weights[..., :length], values, precision=PRECISION)
    inner = weights[..., length:].reshape(*weights.shape[:3], length, count, count)
    own = jnp.einsum("bngtkj,btjnd->btkngd", inner, own_v[..., 0, :], precision=PRECISION)
    out = (out + own.reshape(out.shape)).reshape(len(q), length * count, *q.shape[2:])
    return jnp.concatenate([text, out.astype(q.dtype)], axis=1), cache, ctx


def behind_attend(q, k, v, cache, ctx: TreeRows, *, config, layer):
    """Attention of K rows behind a cache that stays as it is: what `models.attention.tree_attend` says of them, but
    nothing is written, and so nothing copied. All K rows of `ctx` come at once. See `models.attention.Attend` for the
    arguments.
    """
    keys, values = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    slots = jnp.arange(cache.k.shape[2])[None, None, :]
    committed = slots < cache.length[:, None, None]
    committed = jnp.broadcast_to(committed, (len(q), q.shape[1], slots.shape[-1]))
    own = jnp.broadcast_to(ctx.ancestors, (len(q), *ctx.ancestors.shape[1:]))
    if config.window is not None:
        positions = cache.length[:, None] + ctx.depth
        committed &= slots > positions[:, :, None] - config.window
        own &= (ctx.depth[:, :, None] - ctx.depth[:, None, :]) < config.window
    scores = jnp.concatenate([attention_scores(q, cache.k, config), attention_scores(q, keys, config)], axis=-1)
    weights = visible_softmax(scores, jnp.concatenate([committed, own], axis=-1)[:, None, None])
    split = slots.shape[-1]
    out = attention_output(weights[..., :split], cache.v) + attention_output(weights[..., split:], values)
    return out.astype(q.dtype), cache, ctx
