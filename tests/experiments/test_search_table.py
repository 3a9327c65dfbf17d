"""Tables of texts on a tiny model: rows, figures that can be checked by hand, what is kept; isotropy."""

import csv

import numpy as np
import pytest

from decoding.text_metrics import unigram_divergence
from experiments import reproduce, search_table
from experiments.isotropy import layer_isotropy, pooled_isotropy
from models import load_model
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

TABLE = """
type: search
table: lists
source: facts
reference: samples
isotropy: true
stop: false
rows:
  - {name: greedy}
  - {name: samples, method: sample, texts: 2}
  - {name: beam, method: beam, options: {width: 2, num_return: 2}, texts: 2, paper: "0.066"}
presets: {smoke: {prompts: 3, max_new_tokens: 5}}
claims:
  - {text: samples are varied, row: samples, than: beam, measure: distinct_1}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    model = write_tiny_folder(folder / "model")
    (folder / "table.yaml").write_text(TABLE + f"model: {model}\n")
    argv = [str(folder / "table.yaml"), "--preset", "smoke", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        reproduce.main(argv)
    return argv, folder / "out", model


def test_page_and_figures(table):
    _, out, _ = table
    page = (out / "table.md").read_text()
    assert "samples are varied: **" in page and "| normed |" in page and "0.066" in page
    with (out / "table.csv").open() as file:
        found = {(row["row"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}
    assert {row for row, _ in found} == {"greedy", "samples", "beam"}
    assert found["samples", "divergence"] == 0 < found["greedy", "divergence"] <= 1
    assert found["beam", "tokens"] == 5 and ("beam", "oracle_2") in found and ("greedy", "oracle_2") not in found
    assert found["beam", "log_prob"] < 0 and ("samples", "log_prob") not in found
    assert all(value < 0 for (_, name), value in found.items() if name == "coherence")


def test_what_is_finished_is_kept(table, monkeypatch):
    argv, out, _ = table
    before = (out / "table.md").read_text()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(out / "xla"))
    monkeypatch.setattr(search_table, "_write", None)
    monkeypatch.setattr(search_table, "layer_isotropy", None)
    reproduce.main(argv)
    assert (out / "table.md").read_text() == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("reference: samples", "reference: sampels"),
        ("than: beam", "than: beams"),
        ("num_return: 2}, texts: 2", "num_return: 2}, texts: 1"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, before, after):
    (tmp_path / "table.yaml").write_text(TABLE.replace(before, after))
    with pytest.raises(InputError, match="must be a row of|must compare rows|num_return as many"):
        reproduce.main([str(tmp_path / "table.yaml"), "--out", str(tmp_path / "out")])


def test_isotropy_by_hand():
    same = np.tile(np.array([[3.0, 4.0]]), (4, 1))
    assert pooled_isotropy([same]) == pytest.approx(0) and pooled_isotropy([np.eye(5)]) == pytest.approx(1)
    pooled = pooled_isotropy([same, np.eye(2)])
    assert pooled == pytest.approx(1 - 12 / 14), "12 pairs of cosine 1, 2 of cosine 0: not the mean of the texts"
    rng = np.random.default_rng(0)
    shifted = rng.standard_normal((50, 8)) + 20.0
    assert pooled_isotropy([shifted]) < 0.1 and pooled_isotropy([shifted], centred=True) > 0.9
    with pytest.raises(InputError, match="two tokens or more"):
        pooled_isotropy([np.ones((1, 3))])


def test_isotropy_of_layers_does_not_see_padding(table):
    model, params, _ = load_model(str(table[2]))
    texts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    whole = layer_isotropy(model, params, texts)
    assert list(whole) == ["0", "1", "normed"]
    alone = [layer_isotropy(model, params, [text])["1"]["raw"] for text in texts]
    assert whole["1"]["raw"] == pytest.approx((20 * alone[0] + 6 * alone[1]) / 26, abs=1e-4)


def test_divergence_of_unigrams():
    assert unigram_divergence([[1, 2]], [[2, 1], [1, 2]]) == 0
    assert unigram_divergence([[1, 1]], [[2]]) == 1
    assert unigram_divergence([[1, 2]], [[2]]) == pytest.approx(0.311278, abs=1e-5)
    assert np.isnan(unigram_divergence([], [[1]]))
