"""Lexical units: what they are, what placeholders behind them learn, and that the text does not see these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.lexical_units import (
    LexicalUnitConfig,
    lexical_units,
    placeholder_targets,
    places_in_units,
    unit_features,
)
from finetune.objectives import cross_entropy
from finetune.state import Batch
from finetune.trainer import summed_loss
from models.errors import InputError
from tests.support.decode_reference import PROMPTS

CONFIG = LexicalUnitConfig(longest=3, placeholder=60, confidence=0.5)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two texts in the first row, one in the second; the first tokens of each are not to be predicted."""
    texts = [[PROMPTS[4], PROMPTS[7]], [PROMPTS[2][:14]]]
    tokens, segments, positions = (np.zeros((2, 18), np.int32) for _ in range(3))
    targets = np.zeros((2, 18), bool)
    for row, own in enumerate(texts):
        end = 0
        for number, text in enumerate(own, 1):
            place = slice(end, end + len(text))
            tokens[row, place], segments[row, place], positions[row, place] = text, number, range(len(text))
            targets[row, end + 2 : end + len(text)] = True
            end += len(text)
    return Batch(*map(jnp.asarray, (tokens, targets, segments, positions)))


def units(sure: list[bool], longest: int) -> list[list[int]]:
    """The units of a text, by going through it."""
    found: list[list[int]] = []
    for place, goes_on in enumerate(sure):
        if place and goes_on and len(found[-1]) < longest:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def test_units_are_those_of_going_through_the_text():
    rng = np.random.default_rng(0)
    for longest in (2, 3, 5):
        sure = rng.random((6, 40)) < 0.7
        found = np.asarray(places_in_units(jnp.asarray(sure), longest))
        for row, places in zip(sure, found, strict=True):
            own = units(row.tolist(), longest)
            assert places.tolist() == [place for unit in own for place in range(len(unit))]
            assert sum(own, []) == list(range(40)) and max(map(len, own)) == longest
            assert all(row[place] for unit in own for place in unit[1:])


def test_placeholders_predict_the_rest_of_a_unit_alone(batch):
    confidence = np.random.default_rng(1).random(batch.tokens.shape).astype(np.float32)
    labels, counts = map(np.asarray, placeholder_targets(jnp.asarray(confidence), batch.targets, batch.tokens, CONFIG))
    expected = set()
    for row in range(2):
        wanted = np.flatnonzero(batch.targets[row])
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
            sure = [confidence[row, place] > 0.5 for place in run]
            for unit in units(sure, 3):
                expected |= {(row, int(run[unit[0]]) - 1, j - 1, int(run[unit[j]])) for j in range(1, len(unit))}
    assert {tuple(map(int, place)) for place in np.argwhere(counts)} == {place[:3] for place in expected}
    assert len(expected) > 5
    for row, place, step, target in expected:
        assert labels[row, place, step] == batch.tokens[row, target]


def test_the_text_does_not_see_placeholders_and_these_see_no_later_text(tiny, batch):
    model, params = tiny
    of = jax.jit(lambda tokens: model.apply({"params": params}, tokens, batch, CONFIG, method=unit_features))
    x = of(batch.tokens)
    plain = model.apply({"params": params}, batch.tokens[1:, :14], collect=(3,)).hidden[3]
    np.testing.assert_allclose(x[1, :14], plain[0], rtol=1e-3, atol=1e-3)
    row = jnp.concatenate([batch.tokens[1:, :8], jnp.full((1, 2), 60, jnp.int32)], axis=1)
    behind = model.apply({"params": params}, row, collect=(3,)).hidden[3]
    groups = x[1, 18:].reshape(18, 2, -1)
    np.testing.assert_allclose(groups[7], behind[0, 8:], rtol=1e-3, atol=1e-3)
    later = of(batch.tokens.at[1, 8:].set(5))[1, 18:].reshape(18, 2, -1)
    np.testing.assert_allclose(groups[:8], later[:8], rtol=1e-5, atol=1e-5)


def test_without_weight_the_loss_is_that_of_the_text(tiny, batch):
    model, params = tiny
    plain, _ = summed_loss(model, cross_entropy(), params, None, batch)
    config = LexicalUnitConfig(longest=3, placeholder=60, confidence=0.0, weight=0.0)
    found, figures = summed_loss(model, lexical_units(config, model), params, None, batch)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    assert float(figures["tokens"]) == int(batch.targets.sum())
    weighted = LexicalUnitConfig(longest=3, placeholder=60, confidence=0.0, weight=0.5)

    def loss(params):
        return summed_loss(model, lexical_units(weighted, model), params, None, batch)

    (found, figures), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(found, plain + 0.5 * figures["placeholder_loss"], rtol=1e-5)
    assert float(figures["in_units"]) > 10 and float(figures["placeholder_loss"]) > 0
    assert float(jnp.abs(grads["embedding"]["embedding"][:, 60]).max()) > 0, "the placeholder's embedding learns"


def test_settings_out_of_range(tiny):
    for settings, words in (
        ({"longest": 1}, "longest must be at least 2"),
        ({"confidence": 1.0}, "confidence must be from 0 up and below 1"),
        ({"weight": -1.0}, "weight and placeholder must not be negative"),
    ):
        with pytest.raises(InputError, match=words):
            LexicalUnitConfig(**settings)
    with pytest.raises(InputError, match="placeholder 61 is no token"):
        lexical_units(LexicalUnitConfig(placeholder=61), tiny[0])
