"""Groups of beams against beam search itself, and the diversity terms against plain loops."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.search import diversity
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, texts
from tests.support.search_reference import check_scores, hypotheses

STOPS = (3, 17, 29)


def groups_of(tiny, prompts=PROMPTS, room=ROOM, call=None, **options) -> np.ndarray:
    """Returns i32[B, G, W, N], the finished texts of each group."""
    fn = make_decode_fn(tiny[0], "diverse_beam", max_new_tokens=room, **options)
    prompts, call = fn.inputs(prompts, **(call or {}))
    state = fn.advance(tiny[1], fn.start(tiny[1], prompts, call))
    return np.asarray(state.carry.groups.finished.tokens)[..., :room]


@pytest.fixture(scope="module")
def four(tiny):
    """Two groups of two beams, by strength."""
    return {strength: groups_of(tiny, width=4, groups=2, strength=strength) for strength in (0.0, 0.5, 2.0)}


@pytest.fixture(scope="module")
def two(tiny):
    """Beam search with two beams."""
    found = make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, width=2, num_return=2)(tiny[1], PROMPTS).found
    return np.asarray(found.tokens)


@pytest.mark.parametrize("term", ["hamming", "ngram"])
def test_one_group_is_beam_search_at_any_strength(tiny, term):
    options = {"width": 3, "num_return": 3}
    plain = make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, stop_tokens=STOPS, **options)(tiny[1], PROMPTS)
    fn = make_decode_fn(
        tiny[0], "diverse_beam", max_new_tokens=ROOM, stop_tokens=STOPS, groups=1, term=term, strength=3.0, **options
    )
    output = fn(tiny[1], PROMPTS)
    assert texts(output) == texts(plain)
    np.testing.assert_array_equal(output.found.tokens, plain.found.tokens)
    np.testing.assert_array_equal(output.found.scores, plain.found.scores)


def test_without_strength_the_groups_are_independent(four, two):
    for group in (0, 1):
        np.testing.assert_array_equal(four[0.0][:, group], two)


def test_the_first_group_is_beam_search_and_the_others_are_not(four, two):
    for strength in (0.5, 2.0):
        np.testing.assert_array_equal(four[strength][:, 0], two)
        assert (four[strength][:, 1] != two).any(axis=(1, 2)).all()


def test_a_group_more_changes_nothing_before_it(tiny, four):
    more = groups_of(tiny, width=6, groups=3, strength=0.5)
    np.testing.assert_array_equal(more[:, :2], four[0.5])


def test_at_great_strength_all_groups_choose_different_tokens(tiny):
    found = groups_of(tiny, width=4, groups=4, strength=1000.0)[:, :, 0]
    for a, b in itertools.combinations(range(4), 2):
        assert (found[:, a] != found[:, b]).all()


@pytest.mark.parametrize("term", ["hamming", "cumulative", "ngram", "embedding"])
def test_plain_scores_rank_the_texts_and_terms_make_them_differ(tiny, term):
    fn = make_decode_fn(
        tiny[0], "diverse_beam", max_new_tokens=ROOM, width=4, groups=2, num_return=4, term=term, return_scores=True
    )
    output = fn(tiny[1], PROMPTS, strength=1.0)
    check_scores(*tiny, output.found, 1.0)
    assert all(len({tuple(text) for text in hypotheses(output.found, row)}) > 2 for row in range(len(PROMPTS)))
    alone = fn(tiny[1], PROMPTS[2:3], strength=1.0).found
    np.testing.assert_array_equal(alone.tokens[0], output.found.tokens[2])


def chosen() -> diversity.Chosen:
    """Texts over seven tokens that agree here and there, of which one does not count; rows of different lengths."""
    rng = np.random.default_rng(3)
    places = np.array([5, 0, 2], np.int32)
    own, others = rng.integers(0, 3, (3, 2, 8)), rng.integers(0, 3, (3, 4, 8))
    others[0, 0, 2:6], own[0, 1, 1:5] = [1, 2, 1, 2], [0, 1, 2, 1]
    counted = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    return diversity.Chosen(*(jnp.asarray(x, jnp.int32) for x in (own, others)), jnp.asarray(counted), places)


def loops(chosen, vocab: int, weight) -> np.ndarray:
    """Returns f64[B, W, V]: weight(own text with the token, other text) summed over the texts that count."""
    own, others, counted, places = (np.asarray(x) for x in (chosen.own, chosen.texts, chosen.counted, chosen.places))
    result = np.zeros((*own.shape[:2], vocab))
    for row, beam, token in np.ndindex(result.shape):
        text = [*own[row, beam, : places[row]], token]
        for other in range(others.shape[1]):
            if counted[row, other]:
                result[row, beam, token] += weight(text, others[row, other, : places[row] + 1].tolist())
    return result


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_are_counted_wherever_they_stand(n):
    def weight(text, other):
        grams = [tuple(other[i : i + n]) for i in range(len(other) - n + 1)]
        return grams.count(tuple(text[-n:])) if len(text) >= n else 0

    wanted = loops(chosen(), 7, weight)
    assert wanted.max() > 1 or n == 3
    np.testing.assert_allclose(diversity.ngram(chosen(), 7, n), wanted, atol=1e-6)


def test_hamming_counts_beams_with_the_token():
    wanted = loops(chosen(), 7, lambda text, other: text[-1] == other[-1])
    np.testing.assert_allclose(np.broadcast_to(diversity.hamming(chosen(), 7), wanted.shape), wanted, atol=1e-6)


def test_cumulative_forgets_texts_that_differ():
    gamma = np.array([0.5, 2.0, 7.0], np.float32)
    for index, value in enumerate(gamma):
        wanted = loops(
            chosen(), 7, lambda a, b, value=value: math.exp(-sum(x != y for x, y in zip(a, b, strict=True)) / value)
        )
        found = diversity.cumulative(chosen(), 7, jnp.asarray(gamma))
        np.testing.assert_allclose(found[index], wanted[index], atol=1e-6)


def test_embedding_compares_vectors():
    table = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    wanted = loops(chosen(), 7, lambda text, other: cosine(table[:, text[-1]], table[:, other[-1]]))
    memory = diversity.vectors({"embedding": {"embedding": jnp.asarray(table)}})
    found = diversity.embedding(chosen(), memory)
    np.testing.assert_allclose(np.broadcast_to(found, wanted.shape), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 4, "groups": 3}, "groups must divide the width of 4 beams, got 3"),
        ({"width": 4, "groups": 0}, "groups must divide"),
        ({"width": 4, "groups": 8}, "groups must divide"),
        ({"width": 124, "groups": 2}, "width must be at most 122"),
        ({"term": "humming"}, "term must be one of hamming.*got 'humming'"),
        ({"n": 0}, "n must be at least 1"),
        ({"strength": -1}, "strength must be >= 0"),
        ({"gamma": 0}, "gamma must be in"),
        ({"num_return": 9}, "num_return must be 1 to"),
    ],
)
def test_options_that_cannot_be(tiny, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(tiny[0], "diverse_beam", **options)
