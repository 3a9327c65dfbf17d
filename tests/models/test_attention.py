"""Attention against slow loops, and token trees against plain forward passes over each of their paths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import TreeRows, dense_attend, masked_attention, segment_attend, tree_attend
from models.cache import LayerCache, commit, init_cache
from models.config import AttentionConfig
from models.decoder import Decoder

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def slow_attention(q, keys, values, visible, config):
    """One query, one head at a time, in float64: q [B, T, H, Dh], keys and values [B, K, S, Dh], visible [B, T, S]."""
    out = np.zeros(q.shape)
    group = config.num_heads // config.num_kv_heads
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(visible[b, t])
        scores = keys[b, h // group, seen].astype(np.float64) @ q[b, t, h]
        scores *= q.shape[-1] ** -0.5 if config.scale is None else config.scale
        if config.softcap is not None:
            scores = config.softcap * np.tanh(scores / config.softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ values[b, h // group, seen]
    return out


CASES = {
    "plain": AttentionConfig(4, 4, 4),
    "grouped": AttentionConfig(4, 2, 4),
    "one_key_head": AttentionConfig(4, 1, 4),
    "scale": AttentionConfig(4, 2, 4, scale=1.7),
    "softcap": AttentionConfig(4, 2, 4, softcap=0.8),
    "window": AttentionConfig(4, 2, 4, window=3),
    "all": AttentionConfig(4, 2, 4, scale=0.9, window=2, softcap=1.5),
}


@pytest.mark.parametrize("name", ["plain", "grouped", "one_key_head", "scale", "softcap"])
def test_masked_attention(name):
    config = CASES[name]
    q, keys, values = normal(2, 3, config.num_heads, 4), *(normal(2, 2, config.num_kv_heads, 7, 4))
    visible = RNG.random((2, 3, 7)) < 0.5
    visible[..., 2] = True
    got = masked_attention(*map(jnp.asarray, (q, keys, values, visible)), config)
    np.testing.assert_allclose(got, slow_attention(q, keys, values, visible, config), atol=1e-5)


def test_masked_attention_in_bfloat16_has_float32_scores():
    """Scores of 300 apart by 0.25 must not tie, as they would if products were rounded to bfloat16."""
    config = AttentionConfig(1, 1, 2, scale=1.0)
    q = jnp.asarray([[[[300.0, 0.25]]]], jnp.bfloat16)
    keys = jnp.asarray([[[[1.0, 0.0], [1.0, 1.0]]]], jnp.bfloat16)
    values = jnp.asarray([[[[0.0, 1.0], [1.0, 0.0]]]], jnp.bfloat16)
    out = masked_attention(q, keys, values, jnp.ones((1, 1, 2), bool), config)
    assert out.dtype == jnp.bfloat16
    share = 1 / (1 + np.exp(-0.25))
    np.testing.assert_allclose(np.asarray(out, np.float32)[0, 0, 0], [share, 1 - share], rtol=1e-2)


def window_of(config, start, length, num_slots):
    """bool[B, T, S]: what a causal query may see, by the definition, one query at a time."""
    visible = np.zeros((len(start), length, num_slots), bool)
    for b, t in np.ndindex(visible.shape[:2]):
        last = start[b] + t
        first = 0 if config.window is None else max(0, last - config.window + 1)
        visible[b, t, first : last + 1] = True
    return visible


@pytest.mark.parametrize("name", ["grouped", "window", "all"])
def test_dense_attend_without_a_cache(name):
    config = CASES[name]
    q, k, v = normal(2, 5, config.num_heads, 4), *normal(2, 2, 5, config.num_kv_heads, 4)
    out, cache, ctx = dense_attend(*map(jnp.asarray, (q, k, v)), None, "ctx", config=config, layer=0)
    visible = window_of(config, (0, 0), 5, 5)
    np.testing.assert_allclose(out, slow_attention(q, *map(heads_first, (k, v)), visible, config), atol=1e-5)
    assert cache is None and ctx == "ctx"


def heads_first(x):
    return np.swapaxes(x, 1, 2)


@pytest.mark.parametrize("garbage", [0.0, 1e30])
@pytest.mark.parametrize("name", ["grouped", "window", "all"])
def test_dense_attend_with_a_cache(name, garbage):
    """Rows that already hold 0, 4 and 2 tokens: like no cache at all; stale slots change nothing."""
    config, lengths, new = CASES[name], (0, 4, 2), 3
    whole_q = normal(3, 8, config.num_heads, 4)
    whole_k, whole_v = normal(2, 3, 8, config.num_kv_heads, 4)
    stored_k, stored_v = (np.full((3, config.num_kv_heads, 10, 4), garbage, np.float32) for _ in "kv")
    for b, length in enumerate(lengths):
        stored_k[b, :, :length] = heads_first(whole_k)[b, :, :length]
        stored_v[b, :, :length] = heads_first(whole_v)[b, :, :length]
    part = [np.stack([x[b, n : n + new] for b, n in enumerate(lengths)]) for x in (whole_q, whole_k, whole_v)]
    cache = LayerCache(jnp.asarray(stored_k), jnp.asarray(stored_v), jnp.asarray(lengths, jnp.int32))
    out, cache, _ = dense_attend(*map(jnp.asarray, part), cache, None, config=config, layer=0)
    visible = window_of(config, (0, 0, 0), 8, 8)
    expected = slow_attention(whole_q, heads_first(whole_k), heads_first(whole_v), visible, config)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(out[b], expected[b, length : length + new], atol=1e-5, err_msg=f"row {b}")
        kept = np.asarray(cache.k)[b, :, : length + new]
        np.testing.assert_array_equal(kept, heads_first(whole_k)[b, :, : length + new])
    np.testing.assert_array_equal(cache.length, lengths)


PACKED = ((3, 4, 1), (2, 5))  # lengths of the texts of two rows; the second row has one token of padding


def packed_rows():
    """(segments, positions), i32[2, 8], of texts of these lengths; padding is segment 0, position 0."""
    segments, positions = np.zeros((2, 2, 8), np.int32)
    for row, lengths in enumerate(PACKED):
        ends = np.cumsum(lengths)
        for text, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            segments[row, end - length : end] = text + 1
            positions[row, end - length : end] = range(length)
    return segments, positions


@pytest.mark.parametrize("name", ["grouped", "window", "all"])
def test_segment_attend(name):
    """Each text of a packed row attends as if it stood alone."""
    config, (segments, _) = CASES[name], packed_rows()
    q, k, v = normal(2, 8, config.num_heads, 4), *normal(2, 2, 8, config.num_kv_heads, 4)
    out, cache, ctx = segment_attend(*map(jnp.asarray, (q, k, v)), None, jnp.asarray(segments), config=config, layer=0)
    assert cache is None
    np.testing.assert_array_equal(ctx, segments)
    for row, lengths in enumerate(PACKED):
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            text = [jnp.asarray(x[row : row + 1, end - length : end]) for x in (q, k, v)]
            alone, _, _ = dense_attend(*text, None, None, config=config, layer=0)
            np.testing.assert_allclose(out[row, end - length : end], alone[0], atol=1e-5)
    assert np.isfinite(out).all(), "padding"


def test_packed_rows_give_the_logits_of_separate_rows(net):
    """Through the whole model, with a window of 3 in its middle layer; without segments they do not."""
    segments, positions = map(jnp.asarray, packed_rows())
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 61, (2, 8)), jnp.int32)
    packed = np.asarray(net.packed(tokens, positions, segments))
    mixed = np.asarray(net.packed(tokens, positions, jnp.ones_like(segments)))
    for row, lengths in enumerate(PACKED):
        for text, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
            alone = np.zeros((1, 8), np.int32)
            alone[0, :length] = tokens[row, end - length : end]
            expected = net.plain(jnp.asarray(alone))[0, :length]
            np.testing.assert_allclose(packed[row, end - length : end], expected, atol=1e-4, rtol=1e-4)
            assert text == 0 or np.abs(mixed[row, end - length : end] - expected).max() > 0.1


# Two trees of depth 4 with branches, as parents; the second is used with rows in another order too.
PARENT = (-1, 0, 0, 1, 1, 2, 4, 4, 6)
WIDTH = len(PARENT)
CHAIN = tuple(range(-1, WIDTH - 1))
LENGTHS = (5, 9, 1)
NUM_SLOTS = 24


def path_to(parent, row):
    path = [row]
    while parent[path[0]] >= 0:
        path.insert(0, parent[path[0]])
    return path


def tree_rows(parent):
    paths = [path_to(parent, row) for row in range(len(parent))]
    ancestors = np.array([[j in path for j in range(len(parent))] for path in paths])
    return TreeRows(jnp.asarray(ancestors[None]), jnp.asarray([[len(path) - 1 for path in paths]], jnp.int32))


class Net:
    """The tiny model with a window of 3 on its middle layer (shorter than prompts and trees), jitted."""

    def __init__(self, model, params):
        blocks = list(model.config.blocks)
        blocks[1] = dataclasses.replace(blocks[1], attention=dataclasses.replace(blocks[1].attention, window=3))
        self.model = Decoder(dataclasses.replace(model.config, blocks=tuple(blocks)))
        self.attentions = [block.attention for block in blocks]
        self.plain = jax.jit(lambda tokens: self.model.apply({"params": params}, tokens).logits)
        self.dense = jax.jit(lambda tokens, cache: self.model.apply({"params": params}, tokens, None, cache))
        self.packed = jax.jit(
            lambda tokens, positions, segments: (
                self.model.apply({"params": params}, tokens, positions, None, segment_attend, segments).logits
            )
        )
        self._tree = jax.jit(
            lambda tokens, cache, rows: self.model.apply(
                {"params": params}, tokens, cache.length[:, None] + rows.depth, cache, tree_attend, rows
            )
        )

    def tree(self, tokens, cache, rows):
        return np.asarray(self._tree(jnp.asarray(tokens, jnp.int32), cache, rows).logits)


@pytest.fixture(scope="module")
def net(tiny):
    return Net(*tiny)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(1).integers(0, 61, (3, WIDTH))


@pytest.fixture(scope="module")
def cache(net, prompts):
    """Ragged prompts, prefilled; the slots behind each row hold large garbage."""
    empty = init_cache(net.attentions, 3, NUM_SLOTS, jnp.float32)
    cache = net.dense(jnp.asarray(prompts, jnp.int32), empty).cache
    cache = commit(cache, None, jnp.asarray(LENGTHS, jnp.int32))
    stale = (jnp.arange(NUM_SLOTS)[None] >= cache.length[:, None])[:, None, :, None]
    return jax.tree.map(lambda x: jnp.where(stale, 1e30, x) if x.ndim == 4 else x, cache)


@pytest.fixture(scope="module")
def tree_tokens():
    """i32[3, W], with a token twice among siblings and at two depths, so that only the mask tells rows apart."""
    tokens = np.random.default_rng(2).integers(0, 61, (3, WIDTH))
    tokens[:, 4], tokens[:, 6] = tokens[:, 3], tokens[:, 3]
    return tokens


@pytest.fixture(scope="module")
def tree_logits(net, cache, tree_tokens):
    return net.tree(tree_tokens, cache, tree_rows(PARENT))


def test_every_tree_row_equals_a_plain_forward_over_its_path(net, prompts, tree_tokens, tree_logits):
    texts = np.zeros((3 * WIDTH, max(LENGTHS) + 5), np.int64)
    ends = np.zeros(3 * WIDTH, np.int64)
    for index, (b, row) in enumerate(np.ndindex(3, WIDTH)):
        text = [*prompts[b, : LENGTHS[b]], *tree_tokens[b, path_to(PARENT, row)]]
        texts[index, : len(text)], ends[index] = text, len(text) - 1
    assert max(len(path_to(PARENT, row)) for row in range(WIDTH)) == 5
    plain = np.asarray(net.plain(jnp.asarray(texts, jnp.int32)))[np.arange(3 * WIDTH), ends]
    np.testing.assert_allclose(tree_logits, plain.reshape(3, WIDTH, -1), atol=1e-4, rtol=1e-4)


def test_a_chain_equals_dense_steps(net, cache, tree_tokens):
    got = net.tree(tree_tokens, cache, tree_rows(CHAIN))
    for step in range(WIDTH):
        out = net.dense(jnp.asarray(tree_tokens[:, step : step + 1], jnp.int32), cache)
        np.testing.assert_allclose(got[:, step], out.logits[:, 0], atol=1e-4, rtol=1e-4, err_msg=f"step {step}")
        cache = commit(out.cache, None, jnp.ones((3,), jnp.int32))


@pytest.mark.parametrize("changed", range(WIDTH))
def test_a_row_reaches_its_descendants_and_nobody_else(net, cache, tree_tokens, tree_logits, changed):
    tokens = tree_tokens.copy()
    tokens[:, changed] = (tokens[:, changed] + 1) % 61
    moved = np.abs(net.tree(tokens, cache, tree_rows(PARENT)) - tree_logits).max((0, 2))
    below = np.array([changed in path_to(PARENT, row) for row in range(WIDTH)])
    assert (moved[below] > 1e-3).all(), "a descendant does not see the row"
    assert (moved[~below] == 0).all(), "a row that is no descendant sees it"


def test_permuted_rows_give_permuted_logits(net, cache, tree_tokens, tree_logits):
    """The order of rows is free as far as attention goes: ancestors may even stand behind their descendants."""
    order = np.random.default_rng(3).permutation(WIDTH)
    rows = tree_rows(PARENT)
    mixed = TreeRows(rows.ancestors[:, order][:, :, order], rows.depth[:, order])
    got = net.tree(tree_tokens[:, order], cache, mixed)
    np.testing.assert_allclose(got, tree_logits[:, order], atol=1e-4, rtol=1e-4)


def test_each_row_of_the_batch_may_have_its_own_tree(net, cache, tree_tokens, tree_logits):
    trees = [tree_rows(parent) for parent in (PARENT, CHAIN, PARENT)]
    rows = jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
    got = net.tree(tree_tokens, cache, rows)
    np.testing.assert_allclose(got[::2], tree_logits[::2], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got[1], net.tree(tree_tokens, cache, trees[1])[1], atol=1e-5, rtol=1e-5)
    assert np.abs(got[1] - tree_logits[1]).max() > 0.1


@pytest.mark.parametrize("fault", ["sibling seen", "flat depth"])
def test_a_wrong_tree_shows(net, cache, tree_tokens, tree_logits, fault):
    """The negative control of the tests above."""
    rows = tree_rows(PARENT)
    if fault == "sibling seen":
        rows = rows.replace(ancestors=rows.ancestors.at[0, 4, 3].set(True))
    else:
        rows = rows.replace(depth=jnp.broadcast_to(jnp.arange(WIDTH, dtype=jnp.int32)[None], (1, WIDTH)))
    assert np.abs(net.tree(tree_tokens, cache, rows) - tree_logits).max() > 1e-2
