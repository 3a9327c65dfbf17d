"""Finding what carries an intent: the search over layers, exchanged coordinates, trained directions and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.knob import coordinate
from finetune.adapters.saved import Base
from finetune.knob import (
    LayerRange,
    SavedDirection,
    continued,
    exchanged,
    load_direction,
    patched_chances,
    read_last,
    save_direction,
    search_layers,
    train_direction,
)
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, forward

LAYER = 1


@pytest.fixture(scope="module")
def last(tiny):
    return read_last(*tiny, PROMPTS)


def test_last_tokens_are_read_as_in_a_whole_pass(tiny, last):
    for row, prompt in enumerate(PROMPTS):
        whole = forward(*tiny, np.array([prompt + [0] * (16 - len(prompt))]))[0, len(prompt) - 1]
        np.testing.assert_allclose(last.logits[row], whole, atol=1e-3)
    for layer in (0, LAYER, 2):
        np.testing.assert_allclose(
            continued(tiny[0], layer, tiny[1], last.hidden[layer], last.cache), last.logits, atol=1e-3
        )


def test_a_patch_from_the_run_itself_changes_nothing_and_one_from_another_does(tiny, last):
    model, params = tiny
    answers = jnp.argmax(last.logits, axis=-1)
    plain = np.asarray(jax.nn.softmax(last.logits).max(axis=-1))
    every, none = jnp.ones(3, bool), jnp.zeros(3, bool)
    np.testing.assert_allclose(patched_chances(model, params, last, last.outputs, every, answers)[-1], plain, atol=1e-5)
    other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), last.outputs)
    np.testing.assert_allclose(patched_chances(model, params, last, other, none, answers)[-1], plain, atol=1e-5)
    patched = np.asarray(patched_chances(model, params, last, other, every, answers)[-1])
    assert np.abs(patched - plain).max() > 0.05
    upper = patched_chances(model, params, last, other, jnp.array([False, False, True]), answers)
    np.testing.assert_allclose(upper[1], patched_chances(model, params, last, other, none, answers)[1], atol=1e-6)


@pytest.mark.parametrize(("first", "past"), [(0, 1), (2, 5), (4, 12), (11, 12), (0, 12), (5, 6)])
def test_the_search_agrees_with_trying_every_range(first, past):
    """A source that is heard once all layers of a range are patched; brute force tries the ranges in order."""
    wanted = np.zeros(12, bool)
    wanted[first:past] = True
    run = lambda chosen: np.where((chosen | ~wanted).all() & (np.arange(12) >= past - 1), 0.9, 0.02)  # noqa: E731
    found = search_layers(run, 0.1, 12)
    ranges = [(start, stop) for stop in range(1, 13) for start in range(stop)]
    heard = [pair for pair in ranges if run((np.arange(12) >= pair[0]) & (np.arange(12) < pair[1])).max() > 0.8]
    smallest_stop = min(stop for start, stop in heard)
    assert (found.start, found.stop) == (max(start for start, stop in heard if stop == smallest_stop), smallest_stop)
    assert found.reached and not found.more and found.runs <= 10


def test_the_search_adds_layers_at_which_the_answer_is_lost_again():
    def run(chosen):
        chances = np.where(chosen[2] & (np.arange(8) >= 2), 0.9, 0.0)
        for loses in (4, 6):
            if not chosen[loses]:
                chances[loses:] = np.minimum(chances[loses:], 0.3 if loses == 4 else 0.1)
        return chances

    assert search_layers(run, 0.1, 8)[:4] == LayerRange(2, 3, (4, 6), True, 0)[:4]
    assert not search_layers(lambda chosen: np.zeros(8), 0.5, 8).reached


def test_exchanged_coordinates():
    target, source = jax.random.normal(jax.random.key(1), (2, 6, 32))
    unit = jax.random.normal(jax.random.key(2), (32,))
    unit = unit / jnp.linalg.norm(unit)
    after = exchanged(target, source, unit)
    np.testing.assert_allclose(coordinate(after, unit), coordinate(source, unit), atol=1e-5)
    change = after - target
    np.testing.assert_allclose(change - coordinate(change, unit)[:, None] * unit[None], 0.0, atol=1e-5)
    np.testing.assert_allclose(exchanged(after, source, unit), after, atol=1e-5)
    np.testing.assert_allclose(exchanged(target, target, unit), target, atol=1e-6)


def test_a_trained_direction_turns_answers_that_a_planted_one_separates(tiny):
    """Pairs whose streams differ along a planted vector (and by noise): training finds what a random one does not."""
    model, params = tiny
    before = jax.tree.map(np.array, params)
    read = read_last(model, params, [prompt for prompt in PROMPTS for _ in (0, 1)])
    planted = jax.random.normal(jax.random.key(7), (32,))
    planted = planted / jnp.linalg.norm(planted)
    sign = jnp.where(jnp.arange(16) % 2 == 0, 1.0, -1.0)
    scale = 3.0 * jnp.linalg.norm(read.hidden[LAYER], axis=-1).mean()
    hidden = read.hidden[LAYER] + (sign * scale)[:, None] * planted[None]
    read = read.replace(hidden=read.hidden.at[LAYER].set(hidden))
    answers = np.asarray(jnp.argmax(continued(model, LAYER, params, hidden, read.cache), axis=-1))
    differ = np.repeat(answers[::2] != answers[1::2], 2)
    assert differ.sum() >= 8

    def turned(unit):
        partner = np.arange(16) ^ 1
        logits = continued(model, LAYER, params, exchanged(hidden, hidden[partner], jnp.asarray(unit)), read.cache)
        return np.mean((np.asarray(jnp.argmax(logits, axis=-1)) == answers[partner])[differ])

    rows = np.flatnonzero(differ)
    picked = jax.tree.map(lambda x: x[rows], (read.tokens, read.cache, read.logits))
    chosen = read.replace(tokens=picked[0], cache=picked[1], logits=picked[2], hidden=read.hidden[:, rows])
    unit, losses = train_direction(model, params, LAYER, chosen, answers[rows], steps=150, learning_rate=3e-2)
    random = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    assert turned(planted) == 1 and turned(unit) > 0.9 and turned(random / np.linalg.norm(random)) < 0.5
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5) and np.mean(losses[-10:]) < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, params)


def test_files_of_directions(tmp_path):
    base, tuned = Base("tiny", "a" * 64), Base("tiny, tuned", "b" * 64)
    unit = np.eye(32, dtype=np.float32)[3]
    saved = SavedDirection(2, unit, {"turned": 0.75}, base, tuned)
    save_direction(tmp_path / "u.safetensors", saved)
    for model in (base, tuned, None):
        again = load_direction(tmp_path / "u.safetensors", model)
        np.testing.assert_array_equal(again.direction, unit)
        assert again._replace(direction=unit) == saved
    with pytest.raises(InputError, match="belongs to 'tiny'.*not to 'other'"):
        load_direction(tmp_path / "u.safetensors", Base("other", "c" * 64))
    with pytest.raises(InputError, match=r"no such head.*experiments.reproduce configs/tables/context_knob.yaml"):
        load_direction(tmp_path / "none.safetensors", base)
    save_direction(tmp_path / "long.safetensors", saved._replace(direction=2 * unit))
    with pytest.raises(InputError, match="not of length 1"):
        load_direction(tmp_path / "long.safetensors", base)


def test_prompts_that_are_no_pairs(tiny, last):
    with pytest.raises(InputError, match="must come in pairs"):
        train_direction(*tiny, LAYER, last, np.zeros(7, np.int32))
    with pytest.raises(InputError, match="layer must be 0 to 2"):
        train_direction(*tiny, 3, last, np.zeros(8, np.int32))
