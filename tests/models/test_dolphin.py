"""The pair of decoders: memory of contexts, and the main decoder behind it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.contexts import memory_of
from models.decoder import Decoder, Inserted, next_positions
from models.dolphin import Dolphin, DolphinConfig, with_memory
from models.errors import InputError
from tests.conftest import tiny_config
from tests.support.dolphin_pair import CONTEXTS, small_pair


@pytest.fixture(scope="module")
def pair():
    return small_pair()


@pytest.fixture(scope="module")
def padded():
    """The contexts in one array with garbage behind them, and their lengths."""
    lengths = np.array([len(row) for row in CONTEXTS], np.int32)
    tokens = np.full((len(CONTEXTS), 24), 7, np.int32)
    for row, context in zip(tokens, CONTEXTS, strict=True):
        row[: len(context)] = context
    return tokens, lengths


@pytest.fixture(scope="module")
def memory(pair, padded):
    model, params = pair
    return np.asarray(jax.jit(lambda *read: model.apply({"params": params}, *read, method="compress"))(*padded))


def slow_memory(model: Dolphin, params, context: list[int]) -> np.ndarray:
    """The memory of one context, by hand: nothing padded, every token's embedding looked up alone."""
    small = params["compressor"]
    rows = [small["embedding"]["embedding"][:, token] for token in context] + list(params["memory"])
    bound = model.reader.bind({"params": small})
    x, positions = jnp.stack(rows)[None], jnp.arange(len(rows), dtype=jnp.int32)[None]
    hidden = np.asarray(bound.normed(bound.layers(x, positions)[0]))[0, len(context) :]
    first, last = (jax.tree.map(np.asarray, params["projector"][name]) for name in ("first", "last"))
    inner = hidden @ first["kernel"] + first["bias"]
    return np.asarray(jax.nn.gelu(jnp.asarray(inner))) @ last["kernel"] + last["bias"]


def test_memory_is_that_of_a_slow_reference_whatever_stands_behind_a_context(pair, padded, memory):
    model, params = pair
    for row, context in enumerate(CONTEXTS):
        np.testing.assert_allclose(memory[row], slow_memory(model, params, context), rtol=1e-3, atol=1e-4)
    tokens, lengths = padded
    other = np.where(np.arange(24)[None, :] < lengths[:, None], tokens, 3)
    again = jax.jit(lambda *read: model.apply({"params": params}, *read, method="compress"))(other, lengths)
    np.testing.assert_array_equal(again, memory)
    assert np.abs(memory[0] - memory[1]).max() > 1e-2


def test_contexts_read_through_a_cache_have_the_same_memory(pair, memory):
    found = memory_of(*pair, CONTEXTS)
    np.testing.assert_allclose(found, memory, rtol=1e-4, atol=1e-5)


def test_embedded_tokens_in_place_of_tokens_are_these_tokens(pair):
    model, params = pair
    main, values = model.writer, params["main"]
    tokens = jnp.asarray([[5, 9, 11, 3, 60, 2], [7, 8, 1, 4, 30, 6]], jnp.int32)
    positions, start = next_positions(tokens, None), jnp.asarray([1, 3], jnp.int32)
    bound = main.bind({"params": values})
    whole = bound.embed(tokens, positions)
    places = start[:, None] + jnp.arange(2)[None, :]
    part = Inserted(jnp.take_along_axis(whole, places[..., None], axis=1), start)
    np.testing.assert_array_equal(bound.embed(*part.at(jnp.where(part.within(positions), 0, tokens), positions)), whole)
    assert part.within(positions).astype(int).tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_new_memory_is_as_large_as_the_main_decoders_embeddings():
    model, params = small_pair()
    fresh = with_memory(model, jax.random.key(5), params["compressor"], params["main"])
    tokens = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    made = model.apply({"params": fresh}, tokens, jnp.asarray([4], jnp.int32), method="compress")
    sizes = [float(jnp.sqrt(jnp.square(x).mean())) for x in (made, params["main"]["embedding"]["embedding"])]
    assert 0.5 < sizes[0] / sizes[1] < 2
    assert len(np.unique(np.asarray(fresh["memory"]), axis=0)) == model.config.memory


def test_a_memory_that_leaves_no_room_is_refused():
    short = dataclasses.replace(tiny_config(), max_length=8)
    with pytest.raises(InputError, match="memory must be at least 1 token"):
        DolphinConfig(short, tiny_config(), memory=8)
    assert DolphinConfig(short, tiny_config(), memory=3).longest == 5
    assert isinstance(Dolphin(DolphinConfig(short, tiny_config(), 3)).writer, Decoder)
