"""Lexical Unit Decoding: plain greedy decoding at a threshold of 1, a slow reference of whole rows below it."""

import numpy as np
import pytest

from decoding import make_decode_fn
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, forward, greedy_texts, texts

BLANK, K = 60, 3


@pytest.fixture(scope="module")
def fn(tiny):
    return make_decode_fn(tiny[0], "lexical_unit", max_new_tokens=ROOM, longest=K, placeholder=BLANK)


def reference(tiny, prompt, threshold: float) -> tuple[list[int], int]:
    """The text and its passes: placeholders behind the whole text, which is read anew for every pass."""
    text, passes = list(prompt), 0
    while len(text) < len(prompt) + ROOM:
        padded = np.zeros((8, 64), np.int32)
        row = text + [BLANK] * (K - 1)
        padded[0, : len(row)] = row
        logits = np.asarray(forward(*tiny, padded))[0, len(text) - 1 : len(row)].astype(np.float64)
        laws = np.exp(logits - logits.max(axis=1, keepdims=True))
        laws /= laws.sum(axis=1, keepdims=True)
        found = [int(laws[0].argmax())]
        for law in laws[1:]:
            assert abs(law.max() - threshold) > 1e-4, "too close to call"
            if law.max() <= threshold or law.argmax() == found[-1]:
                break
            found.append(int(law.argmax()))
        text, passes = text + found, passes + 1
    return text[len(prompt) : len(prompt) + ROOM], passes


@pytest.mark.parametrize("threshold", [1.0, 7.0])
def test_a_threshold_of_one_is_plain_greedy(tiny, fn, threshold):
    assert texts(fn(tiny[1], PROMPTS, threshold=threshold)) == greedy_texts(*tiny, PROMPTS, ROOM)
    assert texts(fn(tiny[1], PROMPTS[:1], threshold=threshold)) == greedy_texts(*tiny, PROMPTS[:1], ROOM)


def test_blocks_are_those_of_a_slow_reference(tiny, fn):
    thresholds = [0.02, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.95]
    out = fn(tiny[1], PROMPTS, threshold=thresholds)
    expected = [reference(tiny, prompt, bound) for prompt, bound in zip(PROMPTS, thresholds, strict=True)]
    assert texts(out) == [text for text, _ in expected]
    assert np.asarray(out.stats.steps).tolist() == [passes for _, passes in expected]
    assert int(out.stats.steps.min()) < 0.6 * ROOM, "or nothing was ever kept ahead of its turn"


def test_lower_thresholds_take_no_more_passes_on_one_text(tiny, fn):
    prompts, bounds = [PROMPTS[4]] * 8, [0.01, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0, 2.0]
    steps = np.asarray(fn(tiny[1], prompts, threshold=bounds).stats.steps)
    assert steps[0] < steps[-1] == ROOM and steps.min() >= ROOM / K


def test_stops_and_limits_cut_a_block(tiny, fn):
    whole = texts(fn(tiny[1], PROMPTS, threshold=0.05))
    stop = whole[2][10]
    cut = make_decode_fn(
        tiny[0], "lexical_unit", max_new_tokens=ROOM, longest=K, placeholder=BLANK, stop_tokens=(stop,)
    )
    limits = [3, 24, 24, 1, 5, 24, 24, 2]
    expected = [
        text[: min(most, *([text.index(stop) + 1] if stop in text else []), ROOM)]
        for text, most in zip(whole, limits, strict=True)
    ]
    assert texts(cut(tiny[1], PROMPTS, threshold=0.05, max_new_tokens=limits)) == expected


def test_settings_out_of_range(tiny, fn):
    for options, words in (
        ({"longest": 0}, "longest must be at least 1"),
        ({"placeholder": -1}, "placeholder must be a token id"),
        ({"placeholder": 61}, "placeholder 61 is no token of the model"),
    ):
        with pytest.raises(InputError, match=words):
            make_decode_fn(tiny[0], "lexical_unit", max_new_tokens=4, **options)(tiny[1], PROMPTS[:1])
    with pytest.raises(InputError, match="threshold"):
        fn(tiny[1], PROMPTS, threshold=0.0)
