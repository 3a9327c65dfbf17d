"""MoE-X's table on tiny models: equal active parameters, a start from a dense row, controls; finished runs are kept."""

import csv

import numpy as np
import pytest

from experiments import moe_x_table, reproduce, train_table
from experiments.config import load_config
from experiments.moe_x_table import MoeXTableConfig
from models.errors import InputError

TABLE = """
type: moe_x
board:
  scratch: {layers: 1, width: 16, heads: 2, kv_heads: 2, mlp_width: 32, gated: false, max_length: 66,
            tokenizer: othello}
  adapter: null
  data: {type: othello, test_size: 12}
  optimizer: {learning_rate: 1e-2, warmup: 0.0}
  batch_size: 4
  length: 66
  evaluation: {batches: 1}
  saving: {every: 100}
text:
  scratch: {layers: 1, width: 16, heads: 2, kv_heads: 2, mlp_width: 32, gated: false, max_length: 66,
            tokenizer: stories}
  adapter: null
  data: {type: stories, size: 12, test_size: 4, words: 40}
  optimizer: {learning_rate: 1e-2, warmup: 0.0}
  batch_size: 4
  length: 40
  evaluation: {batches: 1}
  saving: {every: 100}
rows:
  - {name: dense, activation: relu}
  - {name: mixed, activation: relu, start: dense, experts: {num: 4, router: sparsity, form: dense}}
  - {name: untrained, activation: relu, trained: false, experts: {num: 4, router: sparsity, form: dense}}
presets: {smoke: {board: 2, text: 2, games: 20, turns: 20, texts: 3, per_decile: 1}}
claims:
  - {text: the claim, row: mixed, than: dense, measure: board/coverage}
  - {text: nothing, row: untrained, than: dense, measure: board/eval/cross_entropy}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe_x")
    (folder / "table.yaml").write_text(TABLE)
    argv = [str(folder / "table.yaml"), "--preset", "smoke", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        reproduce.main(argv)
    return argv, folder / "out"


def found(out):
    with (out / "table.csv").open() as file:
        return {(row["row"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}


def test_the_page_has_all_parts(table):
    _, out = table
    page = (out / "table.md").read_text()
    assert "- the claim: **" in page and "- nothing: **not measured** here." in page
    assert "2 updates of 4 rows of 66 tokens, one run each. Games are broken off after 20 turns." in page
    assert "2 updates of 4 rows of 40 tokens" in page
    assert (out / "plot.png").is_file()


def test_what_is_measured(table):
    figures = found(table[1])
    for row in ("dense", "mixed"):
        assert figures[row, "board/eval/cross_entropy"] == pytest.approx(4.14, abs=0.5), "near that of an even guess"
        assert np.log(4) < figures[row, "board/floor"] < figures[row, "board/eval/cross_entropy"]
        assert 0 < figures[row, "text/coverage"] <= 1 and 0 <= figures[row, "text/reconstruction"] <= 1
        assert 0 < figures[row, "board/coverage"] <= 1 and 0 <= figures[row, "board/reconstruction"] <= 1
        assert 0 <= figures[row, "text/detection"] <= 1
    for part in ("board", "text"):
        assert figures["mixed", f"{part}/active"] == figures["dense", f"{part}/active"]
        assert figures["dense", f"{part}/parameters"] == figures["dense", f"{part}/active"]
        more = figures["mixed", f"{part}/parameters"] - figures["mixed", f"{part}/active"]
        assert more == 2 * 16 * 32  # 4 experts of 16 neurons, of which 2 are idle
        assert figures["mixed", f"{part}/l0"] < 32 and figures["mixed", f"{part}/score_vs_fired"] < -0.5
        assert ("untrained", f"{part}/eval/cross_entropy") not in figures


def test_the_loss_is_without_that_of_the_router():
    figures = train_table.with_held_out({"eval/loss": 3.0, "eval/balance_loss": 0.25, "eval/router_z_loss": 0.5})
    assert figures["eval/cross_entropy"] == 2.25
    assert train_table.with_held_out({"eval/loss": 3.0, "eval/cross_entropy": 1.0})["eval/cross_entropy"] == 1.0


def test_what_is_finished_is_kept(table, monkeypatch):
    argv, out = table
    before = (out / "table.md").read_text()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(out / "xla"))
    monkeypatch.setattr(moe_x_table, "_neurons", None)
    reproduce.main(argv)
    assert (out / "table.md").read_text() == before


def test_a_row_that_starts_from_another_lies_in_a_folder_of_its_settings(table):
    argv, _ = table

    def folder(*flags: str):
        config = load_config(MoeXTableConfig, ["--config", *argv, *flags], prog="", description="")
        return moe_x_table._run(config, "board", config.rows[1], 0)[0]

    assert folder() == folder("--text.batch_size", "8") != folder("--board.batch_size", "8")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("name: mixed", "name: dense", "names of their own"),
        ("start: dense", "start: untrained", "must start from a row before it"),
        ("gated: false", "gated: true", "board.scratch a new model, not gated"),
        ("type: othello", "type: stories", "board.data must be of type othello"),
        ("texts: 3", "texts: 0", "games, texts, per_decile and seeds must be at least 1"),
        ("text: 2,", "text: 2, rows: [wide],", "choose among the rows of this table: dense, mixed, untrained"),
        ("than: dense", "than: deeper", "must compare rows of this table"),
        ("num: 4", "num: 1", "active must be 1 to num, 1 experts; got 2"),
        ("rows:", "layer: 1\nrows:", "layer must be one of the model's, 0 to 0, got 1"),
        ("batches: 1", "batches: 0", "board.evaluation.batches must be at least 1"),
    ],
)
def test_tables_that_cannot_be(tmp_path, before, after, message):
    (tmp_path / "table.yaml").write_text(TABLE.replace(before, after, 1))
    with pytest.raises(InputError, match=message):
        load_config(MoeXTableConfig, ["--config", str(tmp_path / "table.yaml")], prog="", description="")
