"""Texts that end with the cache: a narrow, deep tree moves more rows there than it reads."""

import pytest

from decoding import WithDraft, make_decode_fn
from decoding.speculative.sizing import LatencyCurve
from tests.support.decode_reference import greedy_texts, texts

ROOM = 24
PROMPTS = [[3 + (7 * i) % 50 for i in range(16)], [11, 5, 2, 40, 9, 33, 21, 17, 8, 30, 44, 6, 12, 19, 25, 1]]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dyspec", {"budget": 2}),
        ("aded", {"width": 2}),
        ("token_recycling", {"latency": LatencyCurve((1, 4), (1.0, 1.0))}),
        ("token_recycling", {"latency": LatencyCurve((1, 4), (1.0, 1.0)), "width": 2}),
    ],
)
def test_the_last_tokens_are_those_of_plain_decoding(tiny, method, options):
    """Prompts fill their bucket, so that no slot is to spare."""
    model, params = tiny
    if method == "dyspec":
        options, params = {**options, "draft": model}, WithDraft(params, params)
    fn = make_decode_fn(model, method, max_new_tokens=ROOM, **options)
    expected = greedy_texts(*tiny, PROMPTS, ROOM)
    assert texts(fn(params, PROMPTS)) == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert texts(fn(params, [prompt])) == [text]
