"""The knob: an edit of one coordinate of the residual stream, at the newest token of every step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoding.decode
from decoding import make_decode_fn
from decoding.knob import coordinate, steered
from models.decoder import Decoder
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts

LAYER = 1
DIRECTION = tuple(np.random.default_rng(3).standard_normal(32).tolist())
UNIT = jnp.asarray(np.array(DIRECTION) / np.linalg.norm(DIRECTION), jnp.float32)


@pytest.fixture(scope="module")
def knob(tiny):
    return make_decode_fn(tiny[0], "knob", max_new_tokens=ROOM, layer=LAYER, direction=DIRECTION)


def test_no_strength_is_plain_greedy(tiny, knob):
    assert texts(knob(tiny[1], PROMPTS)) == greedy_texts(*tiny, PROMPTS, ROOM)


def test_a_turned_knob_is_what_a_pass_with_the_edit_at_every_new_place_says(tiny, knob):
    """All places from the prompt's last token on are edited, and no other, in one pass without a cache."""
    model, params = tiny
    strengths = [4.0, -4.0, float("nan"), 0.0, 9.0, -9.0, 2.0, 1.0]
    found = texts(knob(params, PROMPTS, strength=strengths))

    def through(module: Decoder, tokens, first, strength):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        x = module.layers(module.embed(tokens, positions), positions, stop=LAYER + 1)[0]
        x = jnp.where((positions >= first)[..., None], steered(x, UNIT, jnp.full(tokens.shape, strength)), x)
        return module.unembed(module.layers(x, positions, start=LAYER + 1)[0])

    run = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs, method=through))
    for prompt, text, strength in zip(PROMPTS, found, strengths, strict=True):
        whole = np.zeros((1, 48), np.int32)
        whole[0, : len(prompt) + ROOM] = [*prompt, *text]
        logits = np.asarray(run(jnp.asarray(whole), jnp.asarray(len(prompt) - 1), jnp.float32(strength)))[0]
        behind = logits[len(prompt) - 1 : len(prompt) - 1 + ROOM]
        assert (behind.max(axis=1) - behind[np.arange(ROOM), text] < 1e-3).all()
    assert sum(a != b for a, b in zip(found, greedy_texts(*tiny, PROMPTS, ROOM), strict=True)) >= 6


def test_the_edit_is_along_the_direction_alone():
    h = jax.random.normal(jax.random.key(0), (5, 32))
    after = steered(h, UNIT, jnp.full(5, 2.5))
    np.testing.assert_allclose(coordinate(after, UNIT), 2.5, atol=1e-5)
    change = after - h
    np.testing.assert_allclose(change - coordinate(change, UNIT)[:, None] * UNIT[None], 0.0, atol=1e-5)
    np.testing.assert_allclose(steered(after, UNIT, jnp.full(5, 2.5)), after, atol=1e-5)
    np.testing.assert_allclose(steered(h, UNIT, coordinate(h, UNIT)), h, atol=1e-5)
    np.testing.assert_allclose(steered(h, -UNIT, jnp.full(5, -2.5)), after, atol=1e-5)
    np.testing.assert_array_equal(steered(h, UNIT, jnp.full(5, jnp.nan)), h)


def test_a_new_strength_compiles_nothing(tiny, knob):
    knob(tiny[1], PROMPTS, strength=1.0)
    compiled = decoding.decode._decode._cache_size()
    turned = make_decode_fn(tiny[0], "knob", max_new_tokens=ROOM, layer=LAYER, direction=DIRECTION, strength=-4.0)
    assert texts(turned(tiny[1], PROMPTS)) == texts(knob(tiny[1], PROMPTS, strength=-4.0))
    assert decoding.decode._decode._cache_size() == compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "direction must be 32 numbers, the width of this model, got 0: name the file"),
        ({"direction": [1.0] * 31}, "got 31"),
        ({"direction": [0.0] * 32}, "not all zero"),
        ({"direction": "knob.safetensors"}, "direction must be a list of numbers, got 'knob.safetensors'"),
        ({"direction": DIRECTION, "layer": 3}, "layer must be 0 to 2, the blocks of this model; got 3"),
        ({"direction": DIRECTION, "strength": float("inf")}, "strength must be finite, or nan for none, got inf"),
    ],
)
def test_options_that_cannot_be(tiny, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(tiny[0], "knob", **options)
