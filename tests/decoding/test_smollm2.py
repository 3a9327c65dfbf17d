"""Greedy text of the default model against tokens that another implementation made from the same file."""

import json
from pathlib import Path

import pytest

from decoding import make_decode_fn
from tests.support.decode_reference import texts

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_greedy.json"
TOO_CLOSE = 1e-3  # logits; below this gap between first and second another order of additions may choose the second
CACHE_SLOTS = 256


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def decode_fn(smollm2, golden):
    longest = max(len(tokens) for tokens in golden["tokens"])
    stops = golden["stop_tokens"]
    return make_decode_fn(smollm2.model, max_new_tokens=longest, stop_tokens=stops, cache_slots=CACHE_SLOTS)


def assert_same(text: list[int], tokens: list[int], gaps: list[float]) -> int:
    """Compares up to the first choice that was too close to call; returns how many tokens were compared."""
    for step, (ours, theirs) in enumerate(zip(text, tokens, strict=False)):
        if ours != theirs:
            assert gaps[step] < TOO_CLOSE, f"step {step}: token {ours}, expected {theirs} with a gap of {gaps[step]}"
            return step
    assert len(text) == len(tokens), "one text ends before the other"
    return len(text)


def rows(golden: dict) -> list[tuple[list[int], list[int], list[float]]]:
    return list(zip(golden["prompts"], golden["tokens"], golden["gaps"], strict=True))


def test_ragged_batch_equals_the_golden_tokens(smollm2, golden, decode_fn):
    chosen = rows(golden)[:8]
    assert len(chosen) == 8 and len({len(prompt) for prompt, _, _ in chosen}) > 1
    output = texts(decode_fn(smollm2.params, [prompt for prompt, _, _ in chosen]))
    compared = sum(assert_same(text, *row[1:]) for text, row in zip(output, chosen, strict=True))
    assert compared > 0.9 * sum(len(tokens) for _, tokens, _ in chosen)


def test_rows_alone_equal_the_golden_tokens(smollm2, golden, decode_fn):
    shortest = sorted(rows(golden), key=lambda row: len(row[0]))[:3]
    for prompt, tokens, gaps in shortest:
        assert_same(texts(decode_fn(smollm2.params, [prompt]))[0], tokens, gaps)


def test_the_comparison_sees_one_wrong_token():
    with pytest.raises(AssertionError, match="step 1: token 9, expected 2"):
        assert_same([1, 9, 3], [1, 2, 3], [1.0, 1.0, 1.0])
    with pytest.raises(AssertionError, match="ends before"):
        assert_same([1, 2], [1, 2, 3], [1.0, 1.0, 1.0])
    assert assert_same([1, 9, 3], [1, 2, 4], [1.0, 1e-4, 1.0]) == 1
