"""Prompts into buckets and into the cache: one pass, in chunks and token by token give the same cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoding.prefill
from decoding.prefill import Observer, Prompts, bucket_length, observed_prefill, pad_prompts, prefill
from models.cache import KVCache, commit, init_cache
from models.errors import InputError

VOCAB = 61
LENGTHS = (1, 2, 16, 17, 31, 32, 5, 40)  # around the edges of chunks of 16


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, 16), (15, 16), (16, 16), (17, 32), (32, 32), (33, 64), (511, 512), (512, 512), (513, 1024)],
)
def test_bucket_edges(length, bucket):
    assert bucket_length(length) == bucket
    assert pad_prompts([[1] * length], VOCAB).tokens.shape == (1, bucket)


def test_pad_prompts_pads_on_the_right_to_the_longest_rows_bucket():
    prompts = pad_prompts([[5], list(range(17)), np.array([60, 0], np.int64)], VOCAB)
    assert prompts.tokens.shape == (3, 32) and prompts.tokens.dtype == np.int32
    assert prompts.lengths.tolist() == [1, 17, 2]
    assert prompts.tokens[0].tolist() == [5] + [0] * 31
    assert prompts.tokens[1].tolist() == [*range(17)] + [0] * 15
    assert prompts.tokens[2].tolist() == [60] + [0] * 31


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 is empty"),
        ([[1, 2], [3, 61]], "prompt 1 has token id 61, but the model has ids 0 to 60"),
        ([[1, -4, 60]], "prompt 0 has token id -4"),
        ([[2**31]], str(2**31)),
        ([[2**40]], str(2**40)),
        ([[1.5]], "1.5"),
        (["hello"], "hello"),
        ([None], "None"),
    ],
)
def test_pad_prompts_says_what_is_wrong(prompts, words):
    with pytest.raises(InputError, match=words):
        pad_prompts(prompts, VOCAB)


def token_by_token(model, params, prompts: Prompts, num_slots: int) -> KVCache:
    """The cache after every prompt token but the last, read one at a time."""
    layers = [block.attention for block in model.config.blocks]
    cache = init_cache(layers, len(prompts.lengths), num_slots, jnp.float32)

    @jax.jit
    def step(tokens, cache, count):
        return commit(model.apply({"params": params}, tokens, cache=cache).cache, None, count)

    for index in range(int(prompts.lengths.max()) - 1):
        cache = step(prompts.tokens[:, index : index + 1], cache, (index < prompts.lengths - 1).astype(np.int32))
    return cache


def assert_same_cache(actual: KVCache, expected: KVCache, lengths: np.ndarray) -> None:
    """Compares what the lengths do not hide; hidden slots must be finite."""
    np.testing.assert_array_equal(actual.length, lengths - 1)
    np.testing.assert_array_equal(expected.length, lengths - 1)
    for one, other in zip(actual.k + actual.v, expected.k + expected.v, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert np.isfinite(one).all()
        visible = (np.arange(one.shape[2])[None, :] < lengths[:, None] - 1)[:, None, :, None]
        np.testing.assert_allclose(np.where(visible, one, 0), np.where(visible, other, 0), rtol=1e-4, atol=1e-4)


def jitted_prefill(model, params, prompts: Prompts, num_slots: int) -> KVCache:
    """A jit of its own, so that the size of chunks in force is the one that is traced."""
    return jax.jit(functools.partial(prefill, model, num_slots=num_slots))(params, prompts)


@pytest.fixture(scope="module")
def ragged() -> Prompts:
    rng = np.random.default_rng(0)
    return pad_prompts([rng.integers(0, VOCAB, length).tolist() for length in LENGTHS], VOCAB)


@pytest.fixture(scope="module")
def slow_cache(tiny, ragged) -> KVCache:
    return token_by_token(*tiny, ragged, 80)


def test_one_pass_equals_token_by_token(tiny, ragged, slow_cache):
    assert_same_cache(jitted_prefill(*tiny, ragged, 80), slow_cache, ragged.lengths)


@pytest.fixture()
def chunks_of_16(monkeypatch):
    monkeypatch.setattr(decoding.prefill, "CHUNK", 16)


def test_chunks_equal_token_by_token(tiny, ragged, slow_cache, chunks_of_16):
    jaxpr = str(jax.make_jaxpr(functools.partial(prefill, tiny[0], num_slots=80))(tiny[1], ragged))
    assert "i32[8,16]" in jaxpr, "the prompts did not go through in chunks"
    assert_same_cache(jitted_prefill(*tiny, ragged, 80), slow_cache, ragged.lengths)


def inner_sums(model, params, tokens) -> np.ndarray:
    """Returns f64[B, T, L, F]: what enters each layer's down projection at every token of whole rows."""
    keep = {"capture_intermediates": lambda module, _: module.name in ("up", "gate"), "mutable": ["intermediates"]}
    kept = jax.jit(functools.partial(model.apply, **keep))({"params": params}, tokens)[1]["intermediates"]
    layers = [kept[f"layers_{index}"]["mlp"] for index in range(model.config.num_layers)]
    parts = [[np.asarray(layer[name]["__call__"][0], np.float64) for name in ("gate", "up")] for layer in layers]
    return np.stack([gate / (1 + np.exp(-gate)) * up for gate, up in parts], axis=2)


@pytest.mark.parametrize("chunk", [512, 16])
def test_an_observer_sees_every_token_of_the_prompts_once(tiny, slow_cache, ragged, monkeypatch, chunk):
    """The last ones too, though they do not enter the cache; also where a prompt ends with a chunk, or one behind."""
    monkeypatch.setattr(decoding.prefill, "CHUNK", chunk)

    def add(seen, inner, real):
        return seen[0] + real.sum(axis=1), seen[1] + jnp.stack(
            [x.sum(axis=1, where=real[:, :, None]) for x in inner], 1
        )

    expected = inner_sums(*tiny, ragged.tokens)
    for last in (8, 6):  # the longest prompt has 40 tokens, then 32
        some = Prompts(ragged.tokens[:last], ragged.lengths[:last])
        observer = Observer(lambda prompts, last=last: (jnp.zeros((last,), jnp.int32), jnp.zeros((last, 3, 48))), add)
        run = functools.partial(observed_prefill, tiny[0], num_slots=80, observer=observer)
        cache, (count, total) = jax.jit(run)(tiny[1], some)
        np.testing.assert_array_equal(count, some.lengths)
        real = np.arange(64)[None, :] < some.lengths[:, None]
        wanted = np.where(real[:, :, None, None], expected[:last], 0).sum(axis=1)
        np.testing.assert_allclose(total, wanted, rtol=1e-3, atol=1e-3)
        if last == 8:
            assert_same_cache(cache, slow_cache, ragged.lengths)
