"""Figures of laws against whole forward passes in float64, and the temperature that makes laws equally sharp."""

import jax
import numpy as np
import pytest

from decoding.next_token_laws import law_figures, match_entropy
from models.errors import InputError
from tests.support.decode_reference import forward

TEXTS = [[5, 1, 30, 7, 7, 60, 2, 9, 11], [3, 4], [8, 9, 10, 11, 12, 40]]


def reference(tiny, starts, temperature: float) -> tuple[float, float, float]:
    """(bits, top mass, nats) of all tokens from each text's start on."""
    rows = []
    for text, start in zip(TEXTS, starts, strict=True):
        logits = np.asarray(forward(*tiny, np.array([text], np.int32)), np.float64)[0] / temperature
        law = np.exp(logits - logits.max(axis=-1, keepdims=True))
        law /= law.sum(axis=-1, keepdims=True)
        for place in range(start, len(text)):
            p = law[place - 1]
            rows.append((-(p * np.log2(np.maximum(p, 1e-300))).sum(), p.max(), -np.log(p[text[place]])))
    return tuple(np.mean(rows, axis=0))


@pytest.mark.parametrize("starts", [1, [4, 1, 6]])
def test_figures_equal_those_of_whole_forward_passes(tiny, starts):
    temperatures = (1.0, 0.5, 2.0)
    found = law_figures(*tiny, TEXTS, starts, temperatures, batch_size=2)
    for index, temperature in enumerate(temperatures):
        expected = reference(tiny, [starts] * 3 if starts == 1 else starts, temperature)
        seen = (found.entropy[index], found.top_mass[index], found.cross_entropy[index])
        np.testing.assert_allclose(seen, expected, rtol=1e-4)


def test_more_places_than_a_chunk_holds(tiny):
    texts = [np.random.default_rng(0).integers(0, 61, 150).tolist() for _ in range(3)]
    together, apart = law_figures(*tiny, texts, batch_size=3), [law_figures(*tiny, [text]) for text in texts]
    np.testing.assert_allclose(together.entropy, np.mean([one.entropy for one in apart], axis=0), rtol=1e-5)


def test_a_flat_law_has_the_entropy_of_its_vocabulary(tiny):
    model, params = tiny
    flat = {**params, "unembedding": jax.tree.map(np.zeros_like, params["unembedding"])}
    found = law_figures(model, flat, TEXTS)
    np.testing.assert_allclose(found.entropy, np.log2(61), rtol=1e-6)
    np.testing.assert_allclose(found.top_mass, 1 / 61, rtol=1e-6)
    np.testing.assert_allclose(found.cross_entropy, np.log(61), rtol=1e-6)


def test_the_temperature_that_matches_an_entropy_is_found(tiny):
    for temperature in (0.59, 1.0, 2.3):
        wanted = float(law_figures(*tiny, TEXTS, temperatures=(temperature,)).entropy[0])
        assert match_entropy(*tiny, TEXTS, wanted) == pytest.approx(temperature, rel=2e-3)


def test_what_cannot_be_measured_is_said(tiny):
    with pytest.raises(InputError, match="no temperature from 0.05 to 5 .* 9 bits"):
        match_entropy(*tiny, TEXTS, 9.0)
    with pytest.raises(InputError, match="no token to measure"):
        law_figures(*tiny, TEXTS, 9)
    with pytest.raises(InputError, match="no token to measure"):
        law_figures(*tiny, [])
    with pytest.raises(InputError, match="starts at least 1"):
        law_figures(*tiny, TEXTS, 0)
    with pytest.raises(InputError, match="temperatures must be above 0"):
        law_figures(*tiny, TEXTS, temperatures=(1.0, 0.0))
    with pytest.raises(InputError, match="token id 61"):
        law_figures(*tiny, [[61, 3]])
