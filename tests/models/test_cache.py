"""The cache as a value: what append and commit do to each row of a ragged batch, and to a whole model's cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import TreeRows, dense_attend, tree_attend
from models.cache import LayerCache, append, commit, gather_rows, init_cache, repeat_rows
from models.config import AttentionConfig

LAYERS = (AttentionConfig(4, 2, 4), AttentionConfig(4, 1, 6))


def filled(lengths, num_slots=10):
    """A two-layer cache whose keys and values say where they stand: slot + 100 * row (+ 0.5 for values)."""
    cache = init_cache(LAYERS, len(lengths), num_slots, jnp.float32)
    place = 100.0 * np.arange(len(lengths))[:, None] + np.arange(num_slots)[None]
    fill = [jnp.asarray(np.broadcast_to(place[:, None, :, None], k.shape), jnp.float32) for k in cache.k]
    values = tuple(k + 0.5 for k in fill)
    return cache.replace(k=tuple(fill), v=values, length=jnp.asarray(lengths, jnp.int32))


def slots(array):
    """The slot numbers that the entries came from, [B, S], checked to agree over heads and widths."""
    array = np.asarray(array)
    assert (array == array[:, :1, :, :1]).all()
    return array[:, 0, :, 0] - 100 * np.arange(len(array))[:, None]


def i32(*values):
    return jnp.asarray(values, jnp.int32)


def test_empty_cache():
    cache = init_cache(LAYERS, 3, 10, jnp.bfloat16)
    assert cache.num_slots == 10
    assert [x.shape for x in cache.k] == [x.shape for x in cache.v] == [(3, 2, 10, 4), (3, 1, 10, 6)]
    assert {x.dtype for x in (*cache.k, *cache.v)} == {jnp.dtype(jnp.bfloat16)}
    assert cache.length.dtype == jnp.int32 and not cache.length.any()


def test_layers_are_read_and_replaced_alone():
    cache = filled((1, 2))
    part = cache.layer(1)
    np.testing.assert_array_equal(part.k, cache.k[1])
    changed = cache.with_layer(1, part.replace(k=part.k + 1, v=part.v + 2))
    np.testing.assert_array_equal(changed.k[1], cache.k[1] + 1)
    np.testing.assert_array_equal(changed.v[1], cache.v[1] + 2)
    assert changed.k[0] is cache.k[0] and changed.v[0] is cache.v[0]
    np.testing.assert_array_equal(changed.length, cache.length)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_append_writes_behind_each_rows_length(dtype):
    rng = np.random.default_rng(0)
    old_k, old_v = rng.standard_normal((2, 3, 2, 10, 4)).astype(np.float32)
    k, v = rng.standard_normal((2, 3, 4, 2, 4)).astype(np.float32)
    lengths = (0, 6, 3)
    layer = LayerCache(jnp.asarray(old_k, dtype), jnp.asarray(old_v, dtype), i32(*lengths))
    out = append(layer, jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_array_equal(out.length, lengths)
    for got, old, new in ((out.k, old_k, k), (out.v, old_v, v)):
        expected = old.copy()
        for row, length in enumerate(lengths):
            expected[row, :, length : length + 4] = new[row].swapaxes(0, 1)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, jnp.asarray(expected, dtype))


def test_commit_of_a_chain_only_moves_the_lengths():
    cache = filled((2, 0, 5))
    out = commit(cache, None, i32(3, 0, 1))
    np.testing.assert_array_equal(out.length, (5, 0, 6))
    assert all(a is b for a, b in zip(out.k + out.v, cache.k + cache.v, strict=True))


@pytest.mark.parametrize("ignored", [0, -7, 1000])
def test_commit_of_tree_rows_compacts(ignored):
    """Row b ends with its first length[b] slots untouched, then the kept rows; `ignored` entries have no effect."""
    lengths, counts = np.array([2, 0, 5, 4]), np.array([3, 2, 0, 1])
    rows = np.array([[0, 2, 4], [1, 3, ignored], [ignored] * 3, [3, ignored, ignored]])
    out = commit(filled(lengths), jnp.asarray(rows, jnp.int32), jnp.asarray(counts, jnp.int32))
    np.testing.assert_array_equal(out.length, lengths + counts)
    for array, offset in [(x, 0.0) for x in out.k] + [(x, 0.5) for x in out.v]:
        got = slots(array) - offset
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            expected = [*range(length), *(length + rows[row, :count])]
            np.testing.assert_array_equal(got[row, : length + count], expected, err_msg=f"row {row}")


def test_commit_reads_before_it_writes():
    """Kept rows may overlap the slots they move to, in any order."""
    out = commit(filled((1,)), i32([3, 0, 1, 2]), i32(4))
    np.testing.assert_array_equal(slots(out.k[0])[0, :5], [0, 4, 1, 2, 3])


# A tree of depth 3: 0 -> 1, 2;  1 -> 3, 4;  2 -> 5;  4 -> 6.
PARENT = (-1, 0, 0, 1, 1, 2, 4)
DEPTH = (0, 1, 1, 2, 2, 2, 3)
PATHS = ((0, 1, 4, 6), (0, 2, 5), (0,), ())  # what each row of the batch accepts
LENGTHS = (9, 4, 1, 6)


def ancestors():
    table = np.eye(len(PARENT), dtype=bool)
    for row, parent in enumerate(PARENT[1:], start=1):
        table[row] |= table[parent]
    return table[None]


@pytest.fixture(scope="module")
def run(tiny):
    model, params = tiny
    return jax.jit(
        lambda attend, *args: model.apply({"params": params}, *args[:3], attend, *args[3:]), static_argnums=0
    )


@pytest.fixture(scope="module")
def prefill(tiny, run):
    """(tokens [B, T], lengths) -> the committed cache; stale slots hold whatever the padding left."""
    layers = [block.attention for block in tiny[0].config.blocks]

    def prefill(tokens, lengths):
        cache = init_cache(layers, len(tokens), 24, jnp.float32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        out = run(dense_attend, jnp.asarray(tokens, jnp.int32), positions, cache)
        return commit(out.cache, None, jnp.asarray(lengths, jnp.int32))

    return prefill


@pytest.mark.parametrize("garbage", [None, 1e30])
def test_a_compacted_path_equals_a_fresh_prefill(run, prefill, garbage):
    """Keys and values of an accepted path are those that the same tokens would have got one after another."""
    rng = np.random.default_rng(1)
    prompts, tree = rng.integers(0, 61, (4, 13)), rng.integers(0, 61, (4, len(PARENT)))
    cache = prefill(prompts, LENGTHS)
    if garbage is not None:
        stale = (jnp.arange(24)[None] >= cache.length[:, None])[:, None, :, None]
        cache = jax.tree.map(lambda x: jnp.where(stale, garbage, x) if x.ndim == 4 else x, cache)
    rows = TreeRows(jnp.asarray(ancestors()), jnp.asarray([DEPTH], jnp.int32))
    positions = cache.length[:, None] + rows.depth
    written = run(tree_attend, jnp.asarray(tree, jnp.int32), positions, cache, rows).cache
    kept = np.zeros((4, 4), np.int32)
    for row, path in enumerate(PATHS):
        kept[row, : len(path)] = path
    counts = np.array([len(path) for path in PATHS])
    out = commit(written, jnp.asarray(kept), jnp.asarray(counts, jnp.int32))

    whole = np.zeros((4, 13), np.int64)
    for row, (length, path) in enumerate(zip(LENGTHS, PATHS, strict=True)):
        text = [*prompts[row, :length], *tree[row, list(path)]]
        whole[row, : len(text)] = text
    fresh = prefill(whole, np.array(LENGTHS) + counts)
    np.testing.assert_array_equal(out.length, fresh.length)
    for got, expected in zip(out.k + out.v, fresh.k + fresh.v, strict=True):
        for row, length in enumerate(np.asarray(fresh.length)):
            np.testing.assert_allclose(got[row, :, :length], expected[row, :, :length], atol=1e-5, rtol=1e-5)


def test_beams_go_on_from_others_of_their_row():
    """Every array of a pytree follows, lengths too; no beam reaches into another row."""
    cache = filled([3, 7])
    beams = repeat_rows(cache, 3)
    assert [x.shape[0] for x in jax.tree.leaves(beams)] == [6] * 5
    np.testing.assert_array_equal(beams.length, [3, 3, 3, 7, 7, 7])
    own = beams.replace(k=tuple(k + jnp.arange(6.0)[:, None, None, None] for k in beams.k), length=jnp.arange(6))
    parent = i32([2, 0, 0], [1, 1, 2])
    moved = jax.jit(gather_rows)(own, parent)
    order = [2, 0, 0, 4, 4, 5]
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, np.asarray(old)[order]), moved, own)
