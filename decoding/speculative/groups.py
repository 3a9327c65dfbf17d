"""Attention of rows that guess behind a text and never stay: a few behind a cache, in decoding, and a group of them
behind each token of a text at once, in training.

Axis letters: B batch, T tokens of a row, M tokens with a group, K rows of a group, P = M*K, S cache slots, H query
heads, N key heads, G = H/N, E head width.
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
    segment_attend,
    visible_softmax,
)
from models.kernels import PRECISION


class Groups(NamedTuple):
    """Rows behind the tokens of packed texts, K behind each of some.

    Attributes:
        positions: i32[B, T], of the text; so are the segments.
        segments: which text of the row a token belongs to.
        sees: bool[K, K], which row of a group (the second axis) another one sees.
        steps: i[K], how far behind its token each row stands; None: 1 to K.
        places: i32[B, M], the tokens with a group behind them; None: all T.
    """

    positions: jax.Array
    segments: jax.Array
    sees: np.ndarray
    steps: np.ndarray | None = None
    places: jax.Array | None = None


def group_attend(q, k, v, cache, ctx: Groups, *, config, layer):
    """Attention of a text and of pseudo rows behind each of its tokens, T + P rows.

    The text sees itself alone, a pseudo row the text up to its token and its own group. See `models.attention.Attend`
    for the arguments.
    """
    length = ctx.positions.shape[1]
    keys, values = jnp.swapaxes(k[:, :length], 1, 2), jnp.swapaxes(v[:, :length], 1, 2)
    visible, gap = _of_text(ctx)
    near = visible if config.window is None else visible & (gap < config.window)
    text = masked_attention(q[:, :length], keys, values, near, config)
    out = _groups(q[:, length:], k[:, length:], v[:, length:], keys, values, ctx, config)
    return jnp.concatenate([text, out], axis=1), cache, ctx


class Noted(NamedTuple):
    """The context of `noting_attend`: i32[B, T] segments, and the keys and values [B, N, T, E] of the layers so far."""

    segments: jax.Array
    layers: tuple[tuple[jax.Array, jax.Array], ...] = ()


def noting_attend(q, k, v, cache, ctx: Noted, *, config, layer):
    """`models.attention.segment_attend` that notes every layer's keys and values, for rows that come later."""
    out, cache, _ = segment_attend(q, k, v, cache, ctx.segments, config=config, layer=layer)
    own = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    return out, cache, ctx._replace(layers=(*ctx.layers, own))


def noted_attend(q, k, v, cache, ctx: tuple[Groups, Noted], *, config, layer):
    """Attention of the groups of a text, M*K rows, as in `group_attend`; the text itself was read before
    (`noting_attend`), and gradients that are not its own do not touch it.
    """
    out = _groups(q, k, v, *ctx[1].layers[layer], ctx[0], config)
    return out, cache, ctx


def _of_text(ctx: Groups) -> tuple[jax.Array, jax.Array]:
    """Returns (bool[B, T, T] what each token sees of its text, i32[B, T, T] how far away that stands)."""
    visible = ctx.segments[:, :, None] == ctx.segments[:, None, :]
    visible &= jnp.tri(ctx.positions.shape[1], dtype=bool)[None]
    return visible, ctx.positions[:, :, None] - ctx.positions[:, None, :]


def _groups(q, k, v, keys, values, ctx: Groups, config):
    """Returns [B, P, H, E]: what the rows of groups find in the text's keys and values [B, N, T, E] and in their own
    group's.
    """
    visible, gap = _of_text(ctx)
    if ctx.places is not None:
        places = jnp.maximum(ctx.places, 0)[..., None]
        visible, gap = (jnp.take_along_axis(x, places, axis=1) for x in (visible, gap))
    count = ctx.sees.shape[0]
    steps = jnp.arange(1, count + 1) if ctx.steps is None else jnp.asarray(ctx.steps)
    return _with_text(q, k, v, keys, values, visible, gap, jnp.asarray(ctx.sees), steps, config)


def _with_text(q, k, v, keys, values, visible, gap, sees, steps, config):
    """Returns [B, P, H, E], of M groups that see `visible` bool[B, M, S] of the keys and values [B, N, S, E], which
    stand `gap` i32[B, M, S] before the token that a group is behind.
    """
    tokens, length, count = visible.shape[1], visible.shape[2], sees.shape[0]
    behind = jnp.broadcast_to(visible[:, :, None, :], (*visible.shape[:2], count, length))
    if config.window is not None:
        behind &= (gap[:, :, None, :] + steps[None, None, :, None]) < config.window
        sees &= (steps[:, None] - steps[None, :]) < config.window
    own_q, own_k, own_v = (x.reshape(len(x), tokens, count, config.num_kv_heads, -1, x.shape[-1]) for x in (q, k, v))
    context = attention_scores(q, keys, config)  # [B, N, G, P, T]
    group = jnp.einsum("btkngd,btjnd->bngtkj", own_q, own_k[..., 0, :], precision=PRECISION)
    group = scaled(group.astype(jnp.float32), config).reshape(*context.shape[:-1], count)
    shown = jnp.broadcast_to(sees[None, None], (*behind.shape[:3], count))
    shown = jnp.concatenate([behind, shown], axis=-1).reshape(len(q), 1, 1, tokens * count, length + count)
    weights = visible_softmax(jnp.concatenate([context, group], axis=-1), shown).astype(v.dtype)
    out = jnp.einsum("bngps,bnsd->bpngd", weights[..., :length], values, precision=PRECISION)
    inner = weights[..., length:].reshape(*weights.shape[:3], tokens, count, count)
    own = jnp.einsum("bngtkj,btjnd->btkngd", inner, own_v[..., 0, :], precision=PRECISION)
    return (out + own.reshape(out.shape)).reshape(len(q), tokens * count, *q.shape[2:]).astype(q.dtype)


def chain_attend(q, k, v, cache, ctx: jax.Array, *, config, layer):
    """Attention of M chains of K rows behind a cache, each of which ends where it may: nothing is written. `ctx` is
    i32[B, M], how many slots a chain sees. See `models.attention.Attend` for the other arguments.
    """
    count = q.shape[1] // ctx.shape[1]
    gap = ctx[..., None] - 1 - jnp.arange(cache.k.shape[2])[None, None, :]
    sees, steps = jnp.tri(count, dtype=bool), jnp.arange(1, count + 1)
    return _with_text(q, k, v, cache.k, cache.v, gap >= 0, gap, sees, steps, config), cache, ctx


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
