"""Beam search against enumeration, and every text that it returns against whole forward passes."""

import itertools

import numpy as np
import pytest

import decoding.decode
from decoding import METHODS, make_decode_fn
from decoding.search.beam import BEAM
from decoding.search.beams import search_steps
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, small_law_model, texts
from tests.support.search_reference import check_scores, hypotheses, log_probs

OPTIONS = {"width": 4, "num_return": 4, "return_scores": True}
STOPS = (3, 17, 29, 40, 52)
PROMPT = [2, 0, 3]


@pytest.fixture(scope="module")
def stopping(tiny):
    """Beam search with stop tokens that many texts meet."""
    return make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, stop_tokens=STOPS, **OPTIONS)


def test_a_beam_as_wide_as_all_texts_finds_the_likeliest_in_order(monkeypatch):
    model, params = small_law_model()
    made = BEAM._replace(make=lambda model, options, stops: search_steps(model, options.search(), stops))
    monkeypatch.setitem(METHODS, "unchecked", made)
    fn = make_decode_fn(model, "unchecked", max_new_tokens=3, width=125, num_return=125, length_penalty=0.0)
    everything = list(itertools.product(range(5), repeat=3))
    sums = [log_probs(model, params, PROMPT, text).sum() for text in everything]
    order = np.argsort(sums)[::-1]
    found = fn(params, [PROMPT]).found
    np.testing.assert_allclose(found.scores[0], np.array(sums)[order], atol=1e-4)
    assert hypotheses(found, 0)[:5] == [list(everything[index]) for index in order[:5]]
    pairs = make_decode_fn(model, "beam", max_new_tokens=2, width=5)(params, [PROMPT])
    best = max(itertools.product(range(5), repeat=2), key=lambda text: log_probs(model, params, PROMPT, text).sum())
    assert texts(pairs) == [list(best)]


def test_one_beam_is_greedy(tiny):
    fn = make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, width=1)
    assert texts(fn(tiny[1], PROMPTS)) == greedy_texts(*tiny, PROMPTS, ROOM)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_every_text_has_the_score_of_a_whole_pass(tiny, stopping, penalty):
    output = stopping(tiny[1], PROMPTS, length_penalty=penalty)
    check_scores(*tiny, output.found, penalty)
    lengths = {len(text) for row in range(len(PROMPTS)) for text in hypotheses(output.found, row)}
    assert len(lengths) > 3, "texts of several lengths must be compared"
    assert texts(output) == [hypotheses(output.found, row)[0] for row in range(len(PROMPTS))]


def test_texts_end_at_their_first_stop_token_or_at_the_limit(tiny, stopping):
    limit = [ROOM, 5, ROOM, 1, 7, ROOM, 11, 0]
    output = stopping(tiny[1], PROMPTS, max_new_tokens=limit)
    ended = 0
    for row, most in enumerate(limit):
        found = hypotheses(output.found, row)
        assert len({tuple(text) for text in found}) == (4 if most else 1)
        for text in found:
            assert not set(text[:-1]) & set(STOPS)
            assert len(text) == most or text[-1] in STOPS
            ended += bool(text) and text[-1] in STOPS
    assert ended > 5
    np.testing.assert_array_equal(output.stats.emitted, output.lengths)
    assert (np.asarray(output.stats.steps) >= np.asarray(output.lengths)).all()
    np.testing.assert_array_equal(output.stats.histogram.sum(axis=1), output.stats.steps)


def test_all_texts_of_a_row_are_its_own(tiny, stopping):
    together = stopping(tiny[1], PROMPTS).found
    for row in (0, 2, 5):
        alone = stopping(tiny[1], [PROMPTS[row]]).found
        assert hypotheses(alone, 0) == hypotheses(together, row)
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)


def test_when_a_row_ends(tiny, stopping):
    """At once, when what runs is not better now, or when nothing can be any more: in this order of patience."""
    steps, best = {}, {}
    for early in (True, False, "never"):
        options = {**OPTIONS, "early_stopping": early}
        fn = make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, stop_tokens=STOPS, **options)
        output = fn(tiny[1], PROMPTS, length_penalty=0.6)
        steps[early], best[early] = np.asarray(output.stats.steps), np.asarray(output.found.scores)[:, 0]
        check_scores(*tiny, output.found, 0.6)
    assert (steps[True] <= steps[False]).all() and (steps[False] <= steps["never"]).all()
    assert steps[True].sum() < steps[False].sum() < steps["never"].sum()
    assert (best[True] <= best[False] + 1e-5).all() and (best[False] <= best["never"] + 1e-5).all()


def test_length_penalties_vary_by_row_and_compile_nothing(tiny, stopping):
    penalties = np.linspace(-1, 2, len(PROMPTS)).tolist()
    together = stopping(tiny[1], PROMPTS, length_penalty=penalties)
    compiled = decoding.decode._decode._cache_size()
    fn = make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, stop_tokens=STOPS, length_penalty=penalties[6], **OPTIONS)
    uniform = fn(tiny[1], PROMPTS)
    assert decoding.decode._decode._cache_size() == compiled
    assert hypotheses(uniform.found, 6) == hypotheses(together.found, 6)
    assert texts(uniform) != texts(together)


def test_prompts_are_read_once_not_for_every_beam(tiny):
    def flops(width: int) -> float:
        fn = make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, width=width)
        return decoding.decode._start.lower(fn.plan, tiny[1], *fn.inputs(PROMPTS)).cost_analysis()["flops"]

    assert flops(8) < 1.1 * flops(1)


def test_a_full_cache_ends_a_row(tiny):
    prompt = np.random.default_rng(5).integers(0, 61, 30).tolist()
    fn = make_decode_fn(tiny[0], "beam", max_new_tokens=ROOM, cache_slots=40, return_scores=True)
    output = fn(tiny[1], [prompt])
    assert int(output.lengths[0]) == 11
    check_scores(*tiny, output.found, 1.0, [prompt])


@pytest.mark.parametrize("method", ["beam", "greedy"])
def test_a_cache_smaller_than_the_room_for_new_tokens(tiny, method):
    fn = make_decode_fn(tiny[0], method, max_new_tokens=64, cache_slots=32, return_scores=True)
    output = fn(tiny[1], [[1, 2, 3]])
    assert output.tokens.shape == (1, 64) and output.found.token_log_probs.shape == (1, 1, 64)
    assert int(output.lengths[0]) == 30
    check_scores(*tiny, output.found, 1.0 if method == "beam" else 0.0, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be at least 1 beam, got 0"),
        ({"width": 62}, "width must be at most 61.*got 62"),
        ({"width": 4, "num_return": 5}, "num_return must be 1 to the width of 4 beams, got 5"),
        ({"num_return": 0}, "num_return must be 1"),
        ({"early_stopping": "always"}, "early_stopping must be true, false or \"never\", got 'always'"),
        ({"length_penalty": 11}, r"length_penalty must be in \[-10, 10\], got 11"),
        ({"length_penalty": "long"}, "length_penalty must be a number, got 'long'"),
        ({"lenght_penalty": 1.0}, "Did you mean 'length_penalty'"),
        ({"early_stopping": 1}, 'early_stopping must be true, false or "never", got 1'),
        ({"width": "4"}, "width must be a whole number, got '4'"),
        ({"width": 2.5}, "width must be a whole number, got 2.5"),
    ],
)
def test_options_that_cannot_be(tiny, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(tiny[0], "beam", **options)


def test_settings_that_cannot_be(tiny, stopping):
    for call, message in (
        ({"temperature": 0.5}, "method 'beam' takes no temperature"),
        ({"length_penalty": [1.0, 2.0]}, r"length_penalty must be one number or one per row \(8\)"),
        ({"length_penalty": float("nan")}, "length_penalty must be in"),
        ({"strength": 0.5}, "strength"),
    ):
        with pytest.raises(InputError, match=message):
            stopping(tiny[1], PROMPTS, **call)
