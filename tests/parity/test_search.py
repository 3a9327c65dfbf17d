"""Searches of SmolLM2-135M-Instruct against texts that transformers 4.55.4 wrote from the same file."""

import json
from pathlib import Path

import pytest

from tests.support.search_golden import compared

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "search.json").read_text())["smollm2"]
NEW_TOKENS = 24


@pytest.mark.parametrize("program", GOLDEN["programs"], ids=lambda program: program["method"])
def test_texts_and_scores_equal(smollm2, program):
    compared(smollm2.model, smollm2.params, program, GOLDEN["prompts"], NEW_TOKENS)
