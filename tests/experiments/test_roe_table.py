"""Return of the Encoder's table on tiny models: equal parameters, a teacher, speeds; finished parts are kept."""

import csv

import pytest

from experiments import reproduce, roe_table, train_table
from experiments.config import load_config
from experiments.roe_table import RoeTableConfig
from models.errors import InputError

TABLE = """
type: return_of_the_encoder
run:
  scratch: {layers: 1, encoder_layers: 2, width: 16, heads: 2, kv_heads: 1, mlp_width: 32, max_length: 64,
            tokenizer: stories}
  adapter: null
  data: {type: records, size: 12, test_size: 4, records: 3}
  optimizer: {learning_rate: 1e-2, warmup: 0.0}
  batch_size: 4
  source_length: 32
  length: 7
  packing: false
  evaluation: {batches: 1, max_new_tokens: 6}
  saving: {every: 100}
teacher: {layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 64, tokenizer: stories}
latency: {layers: 1, encoder_layers: 2, width: 16, heads: 2, kv_heads: 1, mlp_width: 32, max_length: 64}
rows:
  - {name: plain}
  - {name: taught, reads: 0.667, taught: true, samples: true}
preset: smoke
presets: {smoke: {steps: 2, teacher_steps: 2, examples: 2, lengths: [16, 32], new_tokens: 3, repeats: 1}}
claims:
  - {text: the claim, row: taught, than: plain}
  - {text: the cache, row: taught, than: plain, measure: cache/32, below: true}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roe")
    (folder / "table.yaml").write_text(TABLE)
    argv = [str(folder / "table.yaml"), "--preset", "smoke", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        reproduce.main(argv)
    return argv, folder / "out"


def found(out):
    with (out / "table.csv").open() as file:
        return {(row["row"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}


def test_what_is_measured(table):
    figures = found(table[1])
    plain, taught = (figures[row, "size/trainable"] for row in ("plain", "taught"))
    assert taught == pytest.approx(plain, rel=0.02)
    assert ("taught", "eval/divergence") in figures and ("plain", "eval/divergence") not in figures
    for length in (16, 32):
        for row in ("plain", "taught"):
            assert figures[row, f"first_token/{length}"] > 0 and figures[row, f"tokens_per_second/{length}"] > 0
    # Two numbers of 8 features in 4 bytes: three layers hold what is read and written, or one holds both apart.
    assert figures["plain", "cache/32"] == pytest.approx(3 * 64 * (32 + 3), abs=16)
    assert figures["taught", "cache/32"] == pytest.approx(64 * (32 + 4), abs=16)


def test_the_page_has_all_parts(table):
    page = (table[1] / "table.md").read_text()
    assert "- the claim: **" in page and "- the cache: **reproduced** here" in page
    assert "16 tokens read:" in page and "32 tokens read:" in page and (table[1] / "plot.png").is_file()


def test_what_is_finished_is_kept(table, monkeypatch):
    argv, out = table
    before = found(out)
    monkeypatch.setattr(roe_table, "_measure_speeds", None)
    monkeypatch.setattr("experiments.training.run_training", None)
    reproduce.main(argv)
    assert found(out) == before


@pytest.mark.parametrize(
    ("text", "other", "message"),
    [
        ("packing: false", "packing: true", "run.packing false"),
        ("teacher: {layers: 1", "teacher: {encoder_layers: 2, layers: 1", "the teacher must be decoder-only"),
        ("lengths: [16, 32]", "lengths: [64]", "less than is read and written"),
        ("smoke: {steps: 2", "smoke: {steps: 0", "every count of a preset must be at least 1"),
        ("{name: plain}", "{name: plain, samples: true}", "row 'plain' is taught on samples"),
        ("than: plain}", "than: nobody}", "must compare rows of this table"),
    ],
)
def test_tables_that_cannot_be(tmp_path, text, other, message):
    assert TABLE.count(text) == 1
    (tmp_path / "table.yaml").write_text(TABLE.replace(text, other))
    with pytest.raises(InputError, match=message):
        load_config(RoeTableConfig, ["--config", str(tmp_path / "table.yaml")], prog="test", description="")


def test_the_teacher_is_a_row_of_its_own(table):
    """In a folder whose name says how it was trained: another teacher is another model."""
    assert len(list((table[1] / "runs").glob(f"{roe_table.TEACHER}-????????-0.01/model"))) == 1
    assert train_table.TrainRow().name != roe_table.TEACHER
