"""Grouped-query attention over an explicit cache, and the attend protocol.

How queries meet keys is a value handed to the model, not a subclass of it: `attend(q, k, v, cache, ctx, *, config,
layer)` writes the new keys and values, decides which of them each query sees, and returns `(out, cache, ctx)`. `ctx` is
a pytree that the model threads through its layers; what it means is up to the policy (nothing for `dense_attend`, the
text of each token for `segment_attend`, `TreeRows` for `tree_attend`).

Steps of decoding go through `pallas_kernels.tree_attention` on the devices where that was measured to be faster than
the form here.

Axis letters: B batch, T query length (W for a tree), S cache slots, H query heads, K key/value heads, G = H/K, N = B*K,
R = G*T rows, Dh head width.
"""

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from models.cache import LayerCache, append
from models.config import AttentionConfig, NormConfig
from models.kernels import PRECISION
from models.layers import Linear, Norm, RelativeBias, rotate, softcap
from pallas_kernels.dispatch import kernel_wins
from pallas_kernels.tree_attention import MOST_WIDTH, tree_attention

_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


class Attend(Protocol):
    """A policy: which keys a query sees, and where new keys are kept."""

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: LayerCache | None,
        ctx: Any,
        *,
        config: AttentionConfig,
        layer: int,
        bias: RelativeBias,
    ) -> tuple[jax.Array, LayerCache | None, Any]:
        """Attends. Policies of models without relative positions need not know `bias`: it is then left out.

        Args:
            q: [B, T, H, Dh] queries, rotated.
            k: [B, T, K, Dh] new keys, rotated.
            v: [B, T, K, Dh] new values.
            cache: this layer's cache, or None when the T tokens are all there is (training, scoring).
            ctx: the policy's own pytree, as the layer before left it.
            config: this layer's attention (scale, window, softcap).
            layer: this layer's index in the model.
            bias: what is added to scores by distance.

        Returns:
            out [B, T, H, Dh]; the cache with the T new rows written (its length unchanged); ctx for the next layer.
        """


@struct.dataclass
class TreeRows:
    """The context of `tree_attend`: how the rows of a token tree hang together.

    A tree may be read in one pass (T = W) or level by level: T new rows then follow the W - T rows that earlier passes
    wrote behind the same `length`.

    Attributes:
        ancestors: bool[B or 1, T, W]; [i, j] is true when row j of the tree is new row i itself or an ancestor of it.
        depth: i32[B or 1, W]; each row's distance from `length`, so that its position is length + depth. The caller
            passes the new rows' positions to the model.
        memory: what a policy hands from layer to layer and, where it has something to keep, from step to step.
    """

    ancestors: jax.Array
    depth: jax.Array
    memory: Any = None


def dense_attend(q, k, v, cache, ctx, *, config, layer, bias=None):
    """Causal attention: the token at position p sees positions p - window + 1 to p. See `Attend` for the arguments."""
    if cache is None:
        keys, values, start = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), jnp.zeros((1,), jnp.int32)
    elif bias is None and q.shape[1] == 1 and _kernel_wins(cache, 1):
        row = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32))
        return *tree_attend(q, k, v, cache, row, config=config, layer=layer)[:2], ctx
    else:
        cache = append(cache, k, v)
        keys, values, start = cache.k, cache.v, cache.length
    positions = start[:, None, None] + jnp.arange(q.shape[1])[None, :, None]
    slots = jnp.arange(keys.shape[2])[None, None, :]
    visible = slots <= positions
    if config.window is not None:
        visible &= slots > positions - config.window
    added = None if bias is None else bias(slots - positions)
    return masked_attention(q, keys, values, visible, config, added), cache, ctx


def bidirectional_attend(q, k, v, cache, ctx, *, config, layer, bias=None):
    """Attention of an encoder: every token sees all of its text. See `Attend` for the other arguments.

    `ctx` is i32[B], the tokens of each row's text; what stands behind is padding, and seen by nobody. Takes no cache.
    """
    places = jnp.arange(q.shape[1])
    added = None if bias is None else bias((places[None, :] - places[:, None])[None])
    out = attend_to(q, LayerCache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), ctx), config, added)
    return out, cache, ctx


def attend_to(q: jax.Array, text: LayerCache, config: AttentionConfig, added: jax.Array | None = None) -> jax.Array:
    """Returns what queries [B, T, H, Dh] find in a whole text, [B, T, H, Dh]; see `masked_attention` for `added`."""
    visible = jnp.arange(text.k.shape[2])[None, None, :] < text.length[:, None, None]
    return masked_attention(q, text.k, text.v, visible, config, added)


def segment_attend(q, k, v, cache, ctx, *, config, layer, bias=None):
    """Causal attention inside each of several texts that share a row: training on packed rows.

    `ctx` is i32[B, T], the text that each token belongs to; equal numbers must stand together. Takes no cache. The
    caller passes positions that start anew with each text. See `Attend` for the other arguments.
    """
    places = jnp.arange(q.shape[1])
    visible = (places[None, None, :] <= places[None, :, None]) & (ctx[:, None, :] == ctx[:, :, None])
    if config.window is not None:
        visible &= places[None, None, :] > places[None, :, None] - config.window
    added = None if bias is None else bias((places[None, :] - places[:, None])[None])
    return masked_attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), visible, config, added), cache, ctx


def tree_attend(q, k, v, cache, ctx: TreeRows, *, config, layer):
    """Attention of a token tree: a new row sees every committed slot and its own ancestors, itself included.

    The W rows of the tree stand at slots length..length+W-1 in tree order, the new ones last;
    `models.cache.commit` keeps an accepted path. Needs a cache. See `Attend` for the arguments.
    """
    start = cache.length
    cache = append_rows(cache, k, v, ctx)
    if _kernel_wins(cache, ctx.ancestors.shape[-1]):
        return _kernel_attention(q, cache, start, ctx, config), cache, ctx
    visible = visible_slots(start, ctx, q.shape[1], cache.k.shape[2], config.window)
    return masked_attention(q, cache.k, cache.v, visible, config), cache, ctx


def _kernel_wins(cache: LayerCache, width: int) -> bool:
    """Tells whether a kernel is the faster way to read this cache for a tree of so many rows, where it was measured."""
    if not isinstance(cache.k, jax.Array) or width > MOST_WIDTH:
        return False
    return kernel_wins("tree_attention", cache.k.dtype, cache.k.shape[3], cache.k.shape[2])


def _kernel_attention(
    q: jax.Array, cache: LayerCache, start: jax.Array, rows: TreeRows, config: AttentionConfig
) -> jax.Array:
    """Returns what `tree_attend` does, [B, T, H, Dh], by `pallas_kernels.tree_attention`."""
    width = rows.ancestors.shape[-1]
    slots = (start[:, None] + jnp.arange(width)[None, :])[:, None, :, None]
    tree_k, tree_v = (jnp.take_along_axis(x, slots, axis=2, mode="clip") for x in (cache.k, cache.v))
    options = {"window": config.window, "scale": config.scale, "softcap": config.softcap, "depth": rows.depth}
    return tree_attention(q, cache.k, cache.v, tree_k, tree_v, start, rows.ancestors, impl="pallas", **options)


def append_rows(cache: LayerCache, k: jax.Array, v: jax.Array, rows: TreeRows) -> LayerCache:
    """Writes the new rows k, v [B, T, K, Dh] of a tree behind those that earlier passes wrote."""
    return append(cache, k, v, cache.length + (rows.ancestors.shape[-1] - k.shape[1]))


def visible_slots(start: jax.Array, rows: TreeRows, num_new: int, num_slots: int, window: int | None) -> jax.Array:
    """Returns bool[B, T, S]: the slots that a tree's T new rows see, `start` (i32[B]) tokens being committed."""
    batch, width = len(start), rows.ancestors.shape[-1]
    ancestors = jnp.broadcast_to(rows.ancestors, (batch, num_new, width))
    depth = jnp.broadcast_to(rows.depth, (batch, width))
    slots = jnp.arange(num_slots)[None, None, :]
    committed = jnp.broadcast_to(slots < start[:, None, None], (batch, num_new, num_slots))
    place = jax.vmap(lambda row, block, slot: jax.lax.dynamic_update_slice(row, block, (0, slot)))
    visible = place(committed, ancestors, start)
    if window is not None:
        positions = start[:, None] + depth
        slot_positions = jnp.broadcast_to(slots, (batch, 1, num_slots))
        slot_positions = place(slot_positions, positions[:, None, :], start)
        visible &= slot_positions > positions[:, width - num_new :, None] - window
    return visible


def masked_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    visible: jax.Array,
    config: AttentionConfig,
    added: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention in float32: the reference that every faster form is tested against.

    Args:
        q: [B, T, H, Dh].
        keys: [B, K, S, Dh]. Query head h reads key head h // G.
        values: [B, K, S, Dh]. Hidden slots must be finite.
        visible: bool[B or 1, T or 1, S]; each query must see at least one slot.
        config: scale and softcap.
        added: f32[B or 1, H, T, S], to the scores.

    Returns:
        [B, T, H, Dh] in q's dtype.
    """
    scores = attention_scores(q, keys, config)
    if added is not None:
        scores = scores + rearrange(added, "b (k g) t s -> b k g t s", k=config.num_kv_heads)
    return attention_output(visible_softmax(scores, visible[:, None, None]), values).astype(q.dtype)


def attention_scores(q: jax.Array, keys: jax.Array, config: AttentionConfig) -> jax.Array:
    """Returns the scaled and capped products f32[B, K, G, T, S] of q [B, T, H, Dh] with all keys [B, K, S, Dh]."""
    rows = rearrange(q, "b t (k g) d -> (b k) (g t) d", k=config.num_kv_heads)
    scores = scaled(_head_products("nrd,nsd->nrs", rows, keys), config)
    return rearrange(scores, "(b k) (g t) s -> b k g t s", k=config.num_kv_heads, t=q.shape[1])


def attention_output(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns f32[B, T, H, Dh]: values [B, K, S, Dh] under weights f32[B, K, G, T, S]."""
    num_heads, length = weights.shape[1], weights.shape[3]
    rows = rearrange(weights, "b k g t s -> (b k) (g t) s").astype(values.dtype)
    out = _head_products("nrs,nsd->nrd", rows, values)
    return rearrange(out, "(b k) (g t) d -> b t (k g) d", k=num_heads, t=length)


def scaled(products: jax.Array, config: AttentionConfig) -> jax.Array:
    """Returns the scores of products q k^T: times the layer's scale, then capped."""
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    return softcap(products * scale, config.softcap)


def visible_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Returns the softmax over the last axis of scores f32[...] where `visible` (bool, broadcast to them) is true."""
    return jax.nn.softmax(jnp.where(visible, scores, _HIDDEN), axis=-1)


def _head_products(equation: str, rows: jax.Array, cached: jax.Array) -> jax.Array:
    """Multiplies rows [N, R, ...] with cached [B, K, S, Dh], head by head, N = B*K, in float32.

    One batch axis, as in `models.cache.append`: with a batch of one, XLA would drop the axis B itself, and copy the
    cache to do so.
    """
    cached = rearrange(cached, "b k s d -> (b k) s d")
    return jnp.einsum(equation, rows, cached, precision=PRECISION, preferred_element_type=jnp.float32)


class Attention(nn.Module):
    """Projections, norms and rotation around an attend policy: [B, T, D] -> [B, T, D]."""

    config: AttentionConfig
    norm: NormConfig

    @nn.compact
    def __call__(self, x, rotary, cache, attend: Attend, ctx, layer: int, bias: RelativeBias | None = None):
        """Returns (out [B, T, D], cache, ctx); `rotary` is the `rotary_table` at the tokens' positions, or None."""
        config = self.config
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        q, k = Linear(query_width, config.qkv_bias, name="q")(x), Linear(kv_width, config.qkv_bias, name="k")(x)
        v = Linear(kv_width, config.qkv_bias, name="v")(x)
        if config.qk_norm == "joint":
            q, k = Norm(self.norm, name="q_norm")(q), Norm(self.norm, name="k_norm")(k)
        q, k, v = (rearrange(y, "b t (h d) -> b t h d", d=config.head_dim) for y in (q, k, v))
        if config.qk_norm is True:
            q, k = Norm(self.norm, name="q_norm")(q), Norm(self.norm, name="k_norm")(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        more = {} if bias is None else {"bias": bias}
        out, cache, ctx = attend(q, k, v, cache, ctx, config=config, layer=layer, **more)
        out = Linear(x.shape[-1], config.out_bias, name="o")(rearrange(out, "b t h d -> b t (h d)"))
        return out, cache, ctx


class CrossAttention(nn.Module):
    """Attention to what an encoder has read, without positions: [B, T, D] -> [B, T, D]."""

    config: AttentionConfig
    width: int  # D

    def setup(self) -> None:
        """Makes the projections."""
        config = self.config
        self.q = Linear(config.num_heads * config.head_dim, config.qkv_bias)
        self.k = Linear(config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.v = Linear(config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.o = Linear(self.width, config.out_bias)

    def __call__(self, x: jax.Array, text: LayerCache) -> jax.Array:
        """Returns what x [B, T, D] finds in a text, of which `text` has the keys and values."""
        q = rearrange(self.q(x), "b t (h d) -> b t h d", d=self.config.head_dim)
        return self.o(rearrange(attend_to(q, text, self.config), "b t h d -> b t (h d)"))

    def keys_values(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and values [B, K, S, Dh] of an encoder's output [B, S, D]."""
        return tuple(
            rearrange(project(encoded), "b s (k d) -> b k s d", d=self.config.head_dim) for project in (self.k, self.v)
        )
