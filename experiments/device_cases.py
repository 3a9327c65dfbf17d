"""What `experiments.device_checks` runs: for each kernel its operands, its forms, and the bytes that it has to move.

Axis letters: B batch, K key/value heads, G query heads of each, W new tokens of a step, S cache slots, Dh head width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.block_sparse_prefill import HeadBlocks, block_sparse_prefill
from pallas_kernels.flash_decode import flash_decode, normalize
from pallas_kernels.page_select import PageBounds, page_scores
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.tree_attention import tree_attention

KERNEL, XLA = "pallas", "xla"
Operands = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The network, and how much of a long cache is read where it is not read in full.

    Attributes:
        dtype: of queries and cache.
        batch: sequences of a step; a prompt is read alone.
        kv_heads: K.
        group: G.
        head_dim: Dh.
        page: slots of a page.
        logical: slots of a logical page.
        chosen: slots that pages and lists name, where the cache has as many.
        block: positions of a prompt's block.
    """

    dtype: str = "bfloat16"
    batch: int = 8
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    page: int = 64
    logical: int = 16
    chosen: int = 4096
    block: int = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        kernel: its name.
        slots: S; of a prompt, its length.
        width: W; None where there is none.
        make: key -> operands, the queries first.
        sides: a form's name -> function of the operands; `KERNEL` and `XLA` return the same.
        prepare: what turns the operands into a side's own, before it is timed; none for most.
        num_bytes: operands read once and results written once.
    """

    kernel: str
    slots: int
    width: int | None
    make: Callable[[jax.Array], Operands]
    sides: Mapping[str, Callable[..., Any]]
    num_bytes: int
    prepare: Mapping[str, Callable[..., Operands]] = dataclasses.field(default_factory=dict)


def cases(sizes: Sizes, slots: tuple[int, ...], widths: tuple[int, ...], **kernel: Any) -> Iterator[Case]:
    """Yields every kernel at every size; `kernel` holds more options of the kernel's side, as `interpret`."""
    for count in slots:
        for width in widths:
            yield _flash_decode(sizes, count, width, kernel)
            yield _tree_attention(sizes, count, width, kernel)
        for make in (_pages, _page_scores, _selected):
            yield make(sizes, count, kernel)
        everything = [None] * sizes.kv_heads
        half = [*everything[::2], *[HeadBlocks(1, 2)] * (sizes.kv_heads // 2)]
        yield _prefill("block_sparse_prefill, dense", sizes, count, everything, kernel)
        yield _prefill("block_sparse_prefill, half streaming", sizes, count, half, kernel)


def _normal(key: jax.Array, sizes: Sizes, *shapes: tuple[int, ...]) -> Operands:
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(key, shape, sizes.dtype) for key, shape in zip(keys, shapes, strict=True))


def _cache(sizes: Sizes, slots: int) -> tuple[tuple[int, ...], int]:
    """Returns the shape of keys or values and the bytes of both."""
    shape = (sizes.batch, sizes.kv_heads, slots, sizes.head_dim)
    return shape, 2 * _size(sizes, *shape)


def _size(sizes: Sizes, *shape: int) -> int:
    return jnp.dtype(sizes.dtype).itemsize * math.prod(shape)


def _rows(sizes: Sizes, width: int) -> tuple[int, ...]:
    return sizes.batch, sizes.kv_heads, sizes.group * width, sizes.head_dim


def _both(function: Callable[..., Any], kernel: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Returns the kernel's side and XLA's."""
    return {KERNEL: partial(function, impl="pallas", **kernel), XLA: partial(function, impl="xla")}


def _jax_sides(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Returns the sides of jax.nn.dot_product_attention that this platform has."""
    platforms = ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)
    return {f"jax.nn {name}": partial(function, implementation=name) for name in platforms}


def _flash_decode(sizes: Sizes, slots: int, width: int, kernel: Mapping[str, Any]) -> Case:
    shape, num_bytes = _cache(sizes, slots)

    def make(key):
        q, k, v = _normal(key, sizes, _rows(sizes, width), shape, shape)
        return q, k, v, jnp.full(sizes.batch, slots, jnp.int32)

    def ours(q, k, v, lengths, **options):
        return normalize(flash_decode(q, k, v, lengths, **options))

    def own_layout(q, k, v, lengths):
        q = rearrange(q, "b k (g t) d -> b t (k g) d", g=sizes.group)
        return q, *(rearrange(x, "b k s d -> b s k d") for x in (k, v)), lengths

    def theirs(q, k, v, lengths, implementation):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)

    sides = _jax_sides(theirs)
    prepare = dict.fromkeys(sides, own_layout)
    num_bytes += 3 * _size(sizes, *_rows(sizes, width))  # the result is float32
    return Case("flash_decode", slots, width, make, _both(ours, kernel) | sides, num_bytes, prepare)


def _tree_attention(sizes: Sizes, slots: int, width: int, kernel: Mapping[str, Any]) -> Case:
    shape, num_bytes = _cache(sizes, slots)
    tree, tree_bytes = _cache(sizes, width)
    ancestors = jnp.tril(jnp.ones((1, width, width), bool))

    def make(key):
        q = (sizes.batch, width, sizes.kv_heads * sizes.group, sizes.head_dim)
        return *_normal(key, sizes, q, shape, shape, tree, tree), jnp.full(sizes.batch, slots, jnp.int32)

    def ours(*operands, **options):
        return tree_attention(*operands, ancestors, **options)

    def in_one(q, k, v, tree_k, tree_v, lengths):
        whole = (jnp.concatenate(pair, axis=2) for pair in ((k, tree_k), (v, tree_v)))
        return q, *(rearrange(x, "b k s d -> b s k d") for x in whole)

    def theirs(q, k, v, implementation):
        mask = jnp.concatenate([jnp.ones((1, width, slots), bool), ancestors], axis=2)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    sides = _jax_sides(theirs)
    num_bytes += tree_bytes + 2 * _size(sizes, *_rows(sizes, width))
    prepare = dict.fromkeys(sides, in_one)
    return Case("tree_attention", slots, width, make, _both(ours, kernel) | sides, num_bytes, prepare)


def _pages(sizes: Sizes, slots: int, kernel: Mapping[str, Any]) -> Case:
    shape, _ = _cache(sizes, slots)
    num_pages = slots // sizes.page
    count = min(sizes.chosen // sizes.page, num_pages)

    def make(key):
        q, k, v = _normal(key, sizes, _rows(sizes, 1), shape, shape)
        _, pages = jax.lax.top_k(jax.random.uniform(key, (*shape[:2], num_pages)), count)
        return q, k, v, jnp.full(sizes.batch, slots, jnp.int32), pages

    def ours(q, k, v, lengths, pages, **options):
        return normalize(flash_decode(q, k, v, lengths, pages=pages, page_size=sizes.page, **options))

    num_bytes = _cache(sizes, count * sizes.page)[1] + 3 * _size(sizes, *_rows(sizes, 1))
    return Case("flash_decode, pages", slots, 1, make, _both(ours, kernel), num_bytes)


def _page_scores(sizes: Sizes, slots: int, kernel: Mapping[str, Any]) -> Case:
    shape, num_bytes = _cache(sizes, slots // sizes.logical)
    options = {"page_size": sizes.page, "logical_size": sizes.logical}

    def make(key):
        q, one, other = _normal(key, sizes, _rows(sizes, 1), shape, shape)
        return q, jnp.maximum(one, other), jnp.minimum(one, other), jnp.full(sizes.batch, slots, jnp.int32)

    def ours(q, high, low, lengths, **kernel):
        return page_scores(q, PageBounds(high, low), lengths, **options, **kernel)

    num_bytes += _size(sizes, *_rows(sizes, 1)) + sizes.batch * sizes.kv_heads * sizes.group * (slots // sizes.page) * 4
    return Case("page_scores", slots, 1, make, _both(ours, kernel), num_bytes)


def _selected(sizes: Sizes, slots: int, kernel: Mapping[str, Any]) -> Case:
    shape, _ = _cache(sizes, slots)
    count = min(sizes.chosen, slots)

    def make(key):
        q, k, v = _normal(key, sizes, _rows(sizes, 1), shape, shape)
        return q, k, v, jax.lax.top_k(jax.random.uniform(key, shape[:3]), count)[1]

    def ours(q, k, v, slots, **options):
        return normalize(selected_attention(q, k, v, slots, **options))

    num_bytes = _cache(sizes, count)[1] + 3 * _size(sizes, *_rows(sizes, 1))
    return Case("selected_attention", slots, 1, make, _both(ours, kernel), num_bytes)


def _prefill(name: str, sizes: Sizes, slots: int, heads: list[HeadBlocks | None], kernel: Mapping[str, Any]) -> Case:
    sizes = dataclasses.replace(sizes, batch=1)
    shape, num_bytes = _cache(sizes, slots)

    def make(key):
        q = (1, slots, sizes.kv_heads * sizes.group, sizes.head_dim)
        return *_normal(key, sizes, q, shape, shape), jnp.full(1, slots, jnp.int32)

    def ours(*operands, **options):
        return block_sparse_prefill(*operands, heads, block=sizes.block, **options)

    def own_layout(q, k, v, lengths):
        return q, *(rearrange(x, "b k s d -> b s k d") for x in (k, v))

    def theirs(q, k, v, implementation):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    sides = _jax_sides(theirs) if None in heads and len(set(heads)) == 1 else {}
    num_bytes += 2 * _size(sizes, *_rows(sizes, slots))
    prepare = dict.fromkeys(sides, own_layout)
    return Case(name, slots, None, make, _both(ours, kernel) | sides, num_bytes, prepare)
