"""LServe: streaming heads, and heads that read a constant number of pages of the cache. Lossy.

Source: "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention" (2502.14866). Key/value heads are
split once, by gates: *streaming* heads see the first `sink` tokens and the last `local` ones
(`decoding.sparse.streaming`), the others read the pages of `page` tokens that the newest query scores highest
(`decoding.sparse.pages`), and the page of the newest token, `budget` tokens in all. A choice is made anew whenever the
number of tokens before the newest reaches a multiple of `reuse`, and used until then, layer by layer.

Of all layers and heads together the share `streaming` with the lowest gates (`decoding.sparse.gates`) streams. Prompts
are read with the same split: streaming heads see the first `sink` tokens and the last `prompt_local`, the others
everything. With `kv_bits` keys and values become codes of 8 or 4 bits once the prompts are read
(`models.quantized_cache`); pages are still chosen by bounds of the keys themselves.

Notes: lists of pages are per query head, as in the paper; with `grouped` the query heads of a key/value head share one,
by the highest score. Bounds of a page are computed when it is full, from its keys, in place of being brought up to date
by each token (but for codes); the newest page needs none. All pages are read where history and newest token fit the
budget. A tree's rows share the choice of its root. A layer with a sliding window of its own keeps that, and has no
gates.

Axis letters: B batch, T new rows, H query heads, K key/value heads, G = H/K, J sets of pages, N pages chosen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from decoding.method import Method, Policy, Steps
from decoding.sparse.gates import Gates, retrieval_heads
from decoding.sparse.pages import all_bounds, extended, renewed
from decoding.sparse.selected import (
    chain,
    chunk_attention,
    listed_attention,
    merged,
    own_window,
    query_heads,
    taken_slots,
    window_attention,
    with_tree,
)
from decoding.sparse.steps import SparseOptions, policy_steps
from decoding.sparse.streaming import check_window
from models.attention import TreeRows, append_rows, dense_attend, masked_attention, visible_slots
from models.cache import KVCache, LayerCache, append
from models.config import AttentionConfig, DecoderConfig
from models.decoder import Decoder
from models.errors import InputError
from models.quantized_cache import QuantizedSlots, quantized
from pallas_kernels.flash_decode import slots_of_pages
from pallas_kernels.page_select import PageBounds, chosen_pages, page_scores
from pallas_kernels.tree_attention import MOST_WIDTH, tree_attention

_STREAMING = ("streaming", "sink", "local", "prompt_local")  # options of streaming heads


@dataclasses.dataclass(frozen=True)
class LServeOptions(SparseOptions):
    """Sizes in tokens, and which heads stream.

    Attributes:
        budget: tokens that a head reads at most, the newest page's included: a multiple of `page`, 3 pages at least.
        page: of a page that is chosen as a whole.
        logical: of a logical page; divides `page`.
        reuse: steps that a choice of pages is used for; divides `page`, so that a new page is never missed.
        grouped: the query heads of a key/value head share their pages.
        gates: one number per layer and key/value head (`head_gates`); None: no head streams, and the next four are
            refused.
        streaming: share of the heads that stream, 0 to 1.
        sink: first tokens that a streaming head sees.
        local: last tokens that it sees while decoding.
        prompt_local: last tokens that it sees while prompts are read.
        kv_bits: 8 or 4: after the prompts, keys and values are kept as codes; None: as they are.
    """

    budget: int = 4096
    page: int = 64
    logical: int = 16
    reuse: int = 4
    grouped: bool = False
    gates: Gates | None = None
    streaming: float = 0.5
    sink: int = 128
    local: int = 256
    prompt_local: int = 8192
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sink, self.local)
        check_window(self.sink, self.prompt_local, "prompt_local")
        if self.page < 1:
            raise InputError(f"page must be at least 1 token, got {self.page}")
        for name in ("logical", "reuse"):
            value = getattr(self, name)
            if value < 1 or self.page % value:
                raise InputError(f"{name} must divide page ({self.page} tokens), got {value}")
        if self.budget % self.page or self.budget < 3 * self.page:
            raise InputError(
                f"budget must be a multiple of page ({self.page} tokens), {3 * self.page} at least; got {self.budget}"
            )
        if not 0 <= self.streaming <= 1:
            raise InputError(f"streaming must be a share of the heads, 0 to 1; got {self.streaming}")
        if self.drafted >= min(self.page, MOST_WIDTH):
            raise InputError(f"drafted must be below page ({self.page} tokens) and {MOST_WIDTH}, got {self.drafted}")
        if self.kv_bits not in (None, 4, 8):
            raise InputError(f"kv_bits must be 4 or 8, or None to keep numbers as they are; got {self.kv_bits!r}")
        if self.kv_bits is not None and self.drafted:
            raise InputError("kv_bits takes the bounds of pages from keys as they come: leave out drafted, or kv_bits")
        if self.gates is not None:
            object.__setattr__(self, "gates", tuple(tuple(layer) for layer in self.gates))
            return
        given = [name for name in _STREAMING if getattr(self, name) != getattr(LServeOptions, name)]
        if given:
            raise InputError(
                f"{', '.join(given)} say how heads stream, and without gates none does: give gates (`head_gates` "
                f"measures them), or leave out {', '.join(given)}"
            )


@struct.dataclass
class PageMemory:
    """What a layer remembers from step to step: the bounds of its pages, the pages chosen, i32[B, J, N], and how many
    tokens stood before the newest when they were, i32[B]; -1: not yet.
    """

    bounds: PageBounds
    pages: jax.Array
    chosen_at: jax.Array


def lserve_policy(config: DecoderConfig, options: LServeOptions) -> Policy:
    """Returns the policy. Its context is `TreeRows`, whose memory holds a `PageMemory` or None for each layer."""
    retrieval = retrieval_heads(config, options.gates, options.streaming)
    streaming = tuple(
        tuple(head for head in range(block.attention.num_kv_heads) if head not in heads)
        for block, heads in zip(config.blocks, retrieval, strict=True)
    )
    layers = [block.attention for block in config.blocks]
    paged = [bool(heads) and layer.window is None for heads, layer in zip(retrieval, layers, strict=True)]

    def init(cache: KVCache) -> tuple[PageMemory | None, ...]:
        return tuple(
            _first_memory(layers[index], options, cache.layer(index), retrieval[index]) if paged[index] else None
            for index in range(len(layers))
        )

    def attend(q, k, v, cache, ctx, *, config, layer):
        if config.window is not None:
            return own_window(q, k, v, cache, ctx, config=config, layer=layer)
        cache = append_rows(cache, k, v, ctx)
        parts, memory = [], ctx.memory[layer]
        if paged[layer]:
            out, memory = _paged(options, retrieval[layer], q, k, cache, ctx, memory, config)
            parts.append(out)
        if streaming[layer]:
            window = functools.partial(window_attention, sink=options.sink, local=options.local)
            parts.append(window(q, cache, ctx, config, kv_heads=streaming[layer]))
        memories = tuple(memory if index == layer else other for index, other in enumerate(ctx.memory))
        return together(parts, layer, q), cache, ctx.replace(memory=memories)

    def read(q, k, v, cache, ctx, *, config, layer):
        if config.window is not None or not streaming[layer] or options.prompt_local >= cache.k.shape[2]:
            return dense_attend(q, k, v, cache, ctx, config=config, layer=layer)
        cache = append(cache, k, v)
        window = functools.partial(chunk_attention, sink=options.sink, local=options.prompt_local)
        parts = [window(q, cache, config, kv_heads=streaming[layer])]
        if retrieval[layer]:
            parts.insert(0, _causal(q, cache, retrieval[layer], config))
        return together(parts, layer, q), cache, ctx

    def together(parts: list[jax.Array], layer: int, q: jax.Array) -> jax.Array:
        order = np.argsort([*retrieval[layer], *streaming[layer]])
        return merged(jnp.concatenate(parts, axis=2)[:, :, order], q)

    return Policy(attend, init, read, functools.partial(_kept, bits=options.kv_bits))


def _kept(cache: KVCache, bits: int | None) -> KVCache:
    """Returns the cache with keys and values as codes; None: as it is."""
    if bits is None:
        return cache
    k, v = (tuple(quantized(x, bits) for x in stored) for stored in (cache.k, cache.v))
    return cache.replace(k=k, v=v)


def _first_memory(
    config: AttentionConfig, options: LServeOptions, cache: LayerCache, kv_heads: tuple[int, ...]
) -> PageMemory:
    """Returns a layer's memory behind the prompts."""
    bounds = all_bounds(cache.k, np.asarray(kv_heads), options.page, options.logical, cache.length)
    num_pages, num_sets = -(-cache.k.shape[2] // options.page), len(kv_heads)
    if not options.grouped:
        num_sets *= config.num_heads // config.num_kv_heads
    count = min(options.budget // options.page, num_pages)
    pages = jnp.full((len(cache.length), num_sets, count), -1, jnp.int32)
    return PageMemory(bounds, pages, jnp.full_like(cache.length, -1))


def _paged(options, kv_heads, q, k, cache, ctx, memory: PageMemory, config: AttentionConfig):
    """Returns (f32[B, T, J, G, Dh] of the heads that read pages, the layer's memory)."""
    start, page = cache.length, options.page
    if options.kv_bits is None:
        bounds = renewed(memory.bounds, cache.k, np.asarray(kv_heads), start, page)
    else:  # in the cache are codes
        bounds = extended(memory.bounds, k[:, 0, np.asarray(kv_heads)], start, options.logical)

    def choose() -> jax.Array:
        root = q[:, 0, query_heads(config, kv_heads)].astype(bounds.high.dtype)
        scores = page_scores(root, bounds, start + 1, page_size=page, logical_size=options.logical)
        scores = scores.max(axis=2) if options.grouped else scores.reshape(len(start), -1, scores.shape[3])
        pages = chosen_pages(scores, start + 1, options.budget // page, page_size=page)
        return jnp.where(due[:, None, None], pages, memory.pages)

    due = (memory.chosen_at < 0) | (start // options.reuse != memory.chosen_at // options.reuse)
    pages = jax.lax.cond(due.any(), choose, lambda: memory.pages)
    read = _read_codes if isinstance(cache.k, QuantizedSlots) else _read_pages
    out = read(q, cache, kv_heads, pages, page, ctx, config)
    return out, PageMemory(bounds, pages, jnp.where(due, start, memory.chosen_at))


def _read_pages(q, cache, kv_heads, pages, page, rows: TreeRows, config: AttentionConfig) -> jax.Array:
    """Returns f32[B, T, J, G, Dh]: attention to the pages i32[B, J or J*G, N] and to the tree's rows behind them."""
    start, heads = cache.length, query_heads(config, kv_heads)
    behind = start[:, None] + jnp.arange(rows.ancestors.shape[-1])[None, :]
    behind = jnp.broadcast_to(behind[:, None, :], (len(start), len(kv_heads), behind.shape[1]))
    tree = (taken_slots(x, behind, kv_heads) for x in (cache.k, cache.v))
    out = tree_attention(
        q[:, :, heads.reshape(-1)].astype(cache.k.dtype),
        *(cache.k, cache.v, *tree, start, rows.ancestors),
        pages=pages,
        page_size=page,
        heads=kv_heads,
        scale=config.scale,
        softcap=config.softcap,
    )
    return out.reshape(*out.shape[:2], *heads.shape, -1).astype(jnp.float32)


def _read_codes(q, cache, kv_heads, pages, page, rows: TreeRows, config: AttentionConfig) -> jax.Array:
    """Does what `_read_pages` does for a cache of codes: slot by slot, since no kernel reads codes."""
    start, num_sets = cache.length, pages.shape[1]
    slots = slots_of_pages(rearrange(pages, "b j n -> (b j) n"), jnp.repeat(start, num_sets), page)
    slots = rearrange(slots, "(b j) n -> b 1 j n", j=num_sets)
    return listed_attention(q, cache, kv_heads, *with_tree(slots, slots >= 0, start, rows, q.shape[1]), config)


def _causal(q: jax.Array, cache: LayerCache, kv_heads: tuple[int, ...], config: AttentionConfig) -> jax.Array:
    """Returns dense attention [B, T, J, G, Dh] of some heads; the cache has the T new rows behind its length."""
    heads, kv = query_heads(config, kv_heads), np.asarray(kv_heads)
    visible = visible_slots(cache.length, chain(q.shape[1]), q.shape[1], cache.k.shape[2], None)
    config = dataclasses.replace(config, num_heads=heads.size, num_kv_heads=len(kv))
    out = masked_attention(q[:, :, heads.reshape(-1)], cache.k[:, kv], cache.v[:, kv], visible, config)
    return out.reshape(*out.shape[:2], *heads.shape, -1).astype(jnp.float32)


def make_lserve(model: Decoder, options: LServeOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Samples (greedily by default) with streaming heads and page-sparse ones."""
    return policy_steps(model, lserve_policy(model.config, options), options, stop_tokens)


LSERVE = Method("lossy", LServeOptions, make_lserve, temperature=0.0)
