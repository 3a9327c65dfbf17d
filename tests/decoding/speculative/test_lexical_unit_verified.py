"""Verified lexical units: the shape of a pass, and guesses that are those of placeholders behind the whole text."""

import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.speculative.lexical_unit_verified import guess_rows
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, forward, greedy_texts, texts

BLANK, K = 60, 3


def test_rows_are_a_chain_and_placeholders_behind_each_of_its_rows():
    parent, depth, ancestors = guess_rows(3)
    assert parent.tolist() == [-1, 0, 1, 0, 3, 1, 5, 2, 7]
    assert depth.tolist() == [0, 1, 2, 1, 2, 2, 3, 3, 4]
    assert np.flatnonzero(ancestors[8]).tolist() == [0, 1, 2, 7, 8] and ancestors[4].nonzero()[0].tolist() == [0, 3, 4]


def reference(tiny, prompt: list[int], text: list[int]) -> tuple[int, int]:
    """(passes, accepted guesses) of a greedy text, with placeholders behind the whole text that is read anew."""
    whole, written, passes, accepted, guesses = prompt + text, 0, 0, 0, []
    while written < ROOM:
        right = 0
        while right < len(guesses) and written + right < ROOM and guesses[right] == text[written + right]:
            right += 1
        row = whole[: len(prompt) + written + right] + [BLANK] * (K - 1)
        padded = np.zeros((8, 64), np.int32)
        padded[0, : len(row)] = row
        guesses = np.asarray(forward(*tiny, padded))[0, len(row) - K + 1 : len(row)].argmax(axis=1).tolist()
        passes, accepted, written = passes + 1, accepted + min(right, ROOM - written), written + right + 1
    return passes, accepted


def test_guesses_are_what_placeholders_behind_the_text_say(tiny):
    fn = make_decode_fn(tiny[0], "lexical_unit_verified", max_new_tokens=ROOM, longest=K, placeholder=BLANK)
    plain, out = greedy_texts(*tiny, PROMPTS, ROOM), fn(tiny[1], PROMPTS)
    assert texts(out) == plain
    expected = [reference(tiny, list(prompt), text) for prompt, text in zip(PROMPTS, plain, strict=True)]
    assert np.asarray(out.stats.steps).tolist() == [passes for passes, _ in expected]
    assert np.asarray(out.stats.accepted).tolist() == [accepted for _, accepted in expected]
    assert int(out.stats.accepted.sum()) > 10, "or nothing was ever guessed right"


def test_settings_out_of_range(tiny):
    for options, words in (
        ({"longest": 1}, "longest must be at least 2"),
        ({"placeholder": -1}, "placeholder must be a token id"),
        ({"placeholder": 61}, "placeholder 61 is no token of the model"),
    ):
        with pytest.raises(InputError, match=words):
            make_decode_fn(tiny[0], "lexical_unit_verified", max_new_tokens=4, **options)
