"""Beam, diverse beam and contrastive search of a tiny model against texts that transformers 4.55.4 wrote.

`tests/golden/make_search.py` made them. Every prompt there ran alone; here each program decodes all its prompts and
settings in one ragged batch.
"""

import json
from pathlib import Path

import pytest

from models.weights.load import load_model
from tests.support.search_golden import cases_of, compared
from tests.support.tiny_models import CONFIGS, write_checkpoint

FOLDER = Path(__file__).parents[2] / "golden"
GOLDEN = json.loads((FOLDER / "search.json").read_text())
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The tiny Llama whose weights follow from its tensors' names."""
    folder = tmp_path_factory.mktemp("search") / "llama"
    shapes = json.loads((FOLDER / "families.json").read_text())["shapes"]["llama"]
    write_checkpoint(folder, CONFIGS["llama"], shapes)
    return load_model(folder)


@pytest.mark.parametrize("program", GOLDEN["tiny"]["programs"], ids=lambda p: f"{p['method']}-{p['options']}")
def test_texts_and_scores_equal(llama, program):
    compared(llama.model, llama.params, program, GOLDEN["tiny"]["prompts"], NEW_TOKENS)


@pytest.mark.parametrize("method", ["beam", "diverse_beam", "contrastive"])
def test_there_are_enough_cases_and_they_differ(method):
    rows = cases_of(GOLDEN["tiny"], method)
    assert len(rows) >= 60
    assert len({json.dumps(row["texts"]) for row in rows}) > len(rows) // 3
