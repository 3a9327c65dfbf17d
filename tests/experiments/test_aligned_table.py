"""The table of grammar-aligned decoding: the listed law, distances by hand, ASAp on a toy, the page of a tiny model."""

import csv
import math

import numpy as np
import pytest

from decoding.grammar import Vocabulary, regex
from decoding.grammar.asap import Sample, Trie
from experiments import aligned_table, reproduce
from experiments.aligned_table import curves, distances, true_law
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

VOCABULARY = Vocabulary([b"0", b"1", b"c", None])
TABLE = """
type: grammar_aligned
table: bits
prompt: ab
grammars: [{name: few, pattern: "00|1[01]", paper: "falls"}]
max_new_tokens: 4
samples: {smoke: 8}
claims: [{text: it is nearer, row: "few, ASAp", than: "few, masked", measure: kl, below: true}]
"""


def law(text):
    """0 is likely first, and behind 0 only 1 is likely, which no text of the language goes on with."""
    return np.array([[0.9, 0.05, 0.05, 0.0], [0.01, 0.49, 0.2, 0.3], [0.3, 0.3, 0.2, 0.2]][min(len(text), 2)])


def new_trie(kind, room=4):
    return kind(regex("00|1[01]", VOCABULARY).matcher(), law, [3], room)


def test_the_law_is_listed():
    found = true_law(new_trie(Trie))
    mass = {(0, 0, 3): 0.9 * 0.01 * 0.2, (1, 0, 3): 0.05 * 0.01 * 0.2, (1, 1, 3): 0.05 * 0.49 * 0.2}
    assert found == pytest.approx({text: value / sum(mass.values()) for text, value in mass.items()})
    with pytest.raises(InputError, match="raise it"):
        true_law(new_trie(Trie, room=2))


def test_distances_by_hand():
    truth = {(1, 3): 0.25, (0, 3): 0.75}
    samples = [Sample([1, 3], True, 1), Sample([0, 3], True, 1), Sample([2], False, 1)]
    divergence, variation = distances(samples, truth)
    assert divergence == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) and variation == 0.25
    assert distances(samples[2:], truth) == (math.inf, 1.0)


def test_asap_comes_nearer_than_masking_on_a_toy():
    found = curves(new_trie, 600, 0)
    assert found["ASAp"]["kl"] < 0.1 * found["masked"]["kl"] and found["masked"]["tv"] > 0.3 > found["ASAp"]["tv"]
    assert set(found["ASAp"]) >= {"kl/600", "kl/300", "kl/18"} and found["ASAp"]["texts"] == 3


def test_page_and_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    model = write_tiny_folder(tmp_path / "model")
    (tmp_path / "table.yaml").write_text(TABLE + f"model: {model}\n")
    argv = [str(tmp_path / "table.yaml"), "--preset", "smoke", "--out", str(tmp_path / "out")]
    reproduce.main(argv)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "KL of the first samples" in page
    assert "it is nearer: **" in page and "| falls |" in page and "| few, masked |" in page
    with (tmp_path / "out" / "table.csv").open() as file:
        assert {row["row"] for row in csv.DictReader(file)} == {"few, masked", "few, ASAp"}
    monkeypatch.setattr(aligned_table, "curves", None)
    reproduce.main(argv)
    assert (tmp_path / "out" / "table.md").read_text() == page


def test_settings_that_do_not_fit(tmp_path):
    (tmp_path / "table.yaml").write_text(TABLE.replace("few, masked", "few, mask"))
    with pytest.raises(InputError, match="must compare rows of this table: few, masked, few, ASAp"):
        reproduce.main([str(tmp_path / "table.yaml"), "--out", str(tmp_path / "out")])
