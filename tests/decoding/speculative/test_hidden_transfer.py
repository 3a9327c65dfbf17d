"""Pseudo hidden states: where they stand, what they see, and that both ways to run them agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.prefill import pad_prompts, prefill
from decoding.speculative.draft_head import Reading, scores
from decoding.speculative.hidden_transfer import (
    HIDDEN_TRANSFER_HEAD,
    HiddenTransferConfig,
    HiddenTransferOptions,
    cached_streams,
    pseudo_streams,
    transfer,
    visible_groups,
)
from models.errors import InputError

LENGTH, LAST = 16, 3
SETTINGS = ({"layers": (1,)}, {"layers": (2, 1, 3)}, {"layers": (0,), "interact": False})


@pytest.fixture(scope="module")
def reading(tiny) -> Reading:
    """A row with two texts and padding, and their streams; the middle layer's window is shorter than the first text."""
    model, params = tiny
    rng = np.random.default_rng(3)
    first, second = (rng.integers(0, 61, size).tolist() for size in (10, 4))
    streams = [
        model.apply({"params": params}, jnp.asarray([text]), collect=(0, 1, 2, LAST)).hidden for text in (first, second)
    ]
    padding = jnp.ones((1, 2, 32))
    hidden = {i: jnp.concatenate([streams[0][i], streams[1][i], padding], axis=1) for i in streams[0]}
    positions = jnp.asarray([[*range(10), *range(4), 0, 1]])
    segments = jnp.asarray([[1] * 10 + [2] * 4 + [0] * 2])
    return Reading(jnp.asarray([[*first, *second, 0, 0]]), positions, segments, hidden)


def random_values(tiny, config):
    fresh = HIDDEN_TRANSFER_HEAD.init(config, *tiny, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@pytest.mark.parametrize("layers", [(1,), (1, 2, 2), (0,)])
def test_true_states_give_true_logits(tiny, reading, layers):
    """The oracle: with the text's own streams of the tokens ahead, the pseudo states are the text's own. (An offset
    that enters before those it follows would miss them.)
    """
    model, params = tiny
    config = HiddenTransferConfig(layers=layers)

    def enter(offset, layer, h):
        return jnp.roll(reading.hidden[layer], -1 - offset, axis=1)

    x = pseudo_streams(config, model, params, reading, enter)
    for start, stop in ((0, 10), (10, 14)):
        for place in range(start, stop - 3):
            for offset in range(3):
                true = reading.hidden[LAST][0, place + 1 + offset]
                np.testing.assert_allclose(x[0, place, offset], true, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_decoding_runs_the_states_that_training_ran(tiny, reading, settings):
    model, params = tiny
    config = HiddenTransferConfig(**settings)
    values = random_values(tiny, config)

    def entering(offset, layer, h):
        return transfer(model, params, values, offset, layer, h)

    trained = pseudo_streams(config, model, params, reading, entering)
    text = reading.tokens[0, :10].tolist()
    for depth in (3, 2):
        cache = prefill(model, params, pad_prompts([text[:8], text], 61), 24)  # without their last tokens

        def enter(offset, layer):
            return entering(offset, layer, reading.hidden[layer][0, jnp.asarray([6, 8])])

        found = cached_streams(config, model, params, cache, depth, enter)
        np.testing.assert_allclose(found, trained[0, jnp.asarray([6, 8]), :depth], rtol=2e-4, atol=2e-4)


def test_behind_the_last_layer_nothing_attends(tiny, reading):
    model, params = tiny
    config = HiddenTransferConfig(layers=(LAST,))
    values = random_values(tiny, config)
    guesses = HIDDEN_TRANSFER_HEAD.guesses(config, model, params, values, reading)
    h = reading.hidden[LAST]
    read = model.apply({"params": params}, h, method="normed")
    moved = h + read @ values["kernel"][1] + values["bias"][1][None, None]
    expected = model.apply({"params": params}, moved, method="unembed")
    np.testing.assert_allclose(scores(model, params, guesses[:, :, 1]), expected, rtol=1e-3, atol=1e-3)


def test_fresh_states_repeat_the_last_token(tiny, reading):
    """A and b zero, entering at the embedding: the first pseudo state is the text's last token once more."""
    model, params = tiny
    config = HiddenTransferConfig(layers=(0,))
    values = HIDDEN_TRANSFER_HEAD.init(config, model, params, jax.random.key(0))
    guesses = HIDDEN_TRANSFER_HEAD.guesses(config, model, params, values, reading)
    repeated = jnp.asarray([[*reading.tokens[0, :6].tolist(), int(reading.tokens[0, 5])]])
    expected = model.apply({"params": params}, repeated).logits[0, -1]
    np.testing.assert_allclose(scores(model, params, guesses[0, 5, 0]), expected, rtol=1e-3, atol=1e-3)


def test_offsets_depend_on_those_before_them_only_where_they_interact(tiny, reading):
    for interact in (True, False):
        config = HiddenTransferConfig(layers=(1,), interact=interact)
        values = random_values(tiny, config)
        moved = {**values, "bias": values["bias"].at[0].add(1.0)}
        before, after = (
            np.asarray(HIDDEN_TRANSFER_HEAD.guesses(config, *tiny, v, reading))[0, :14] for v in (values, moved)
        )
        changed = np.abs(before - after).max(axis=(0, 2)) > 1e-4
        assert changed.tolist() == [True, interact, interact]
    np.testing.assert_array_equal(
        visible_groups(HiddenTransferConfig(layers=(2, 1, 1)), 1), [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    )


def test_errors(tiny):
    model, _ = tiny
    for bad in ({"layers": (1, 2)}, {"layers": (-1,)}, {"layers": ()}):
        with pytest.raises(InputError, match="layers must be one layer, or one for each of 3 offsets"):
            HiddenTransferConfig(**bad)
    with pytest.raises(InputError, match="the model has 3 layers: nothing can enter layer 20"):
        HIDDEN_TRANSFER_HEAD.streams(HiddenTransferConfig(), model)
    with pytest.raises(InputError, match="head must be a HiddenTransferConfig"):
        HiddenTransferOptions(head=None)
