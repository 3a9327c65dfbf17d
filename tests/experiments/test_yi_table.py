"""Yi's table on tiny models: rows before and after training, recall, the cascade; what is finished is kept."""

import csv
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import reproduce, yi_table
from experiments.yi_table import RecallGrid, recall_shares
from finetune.stories import story_tokenizer
from models.errors import InputError

TABLE = """
type: yi
table: yi
depth:
  start: &start
    scratch: {layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 32, tokenizer: stories}
    adapter: null
    data: {type: stories, size: 20, test_size: 4, words: 24}
    batch_size: 4
    length: 24
    evaluation: {every: 0, examples: 0, batches: 0}
  run:
    data: {type: stories, size: 20, test_size: 4, words: 24}
    optimizer: {schedule: constant, warmup: 0.0}
    batch_size: 4
    length: 24
    evaluation: {batches: 1}
  rows:
    - {name: grown, adapter: null, growth: {double: [0, 1], identity: true}, learning_rates: [1e-2]}
  presets: {smoke: {base_steps: 1, steps: 4, examples: 2}}
context:
  start: *start
  run:
    data: {type: recall, size: 20, test_size: 4, words: 16, facts: 2}
    batch_size: 4
    length: 24
    packing: false
    evaluation: {batches: 1, max_new_tokens: 1}
  rows:
    - {name: longer, adapter: null, growth: {rope_theta: 1.0e+6, max_length: 64}, learning_rates: [1e-2]}
  presets: {smoke: {base_steps: 1, steps: 2, examples: 2}}
recall: {words: [40], depths: [0.0, 1.0], facts: 2}
texts: {smoke: 40}
claims:
  - {text: training helps, row: grown, than: grown at first, measure: eval/cross_entropy, below: true}
  - {text: it recalls, row: longer, than: longer at first, measure: recall/40}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yi")
    (folder / "table.yaml").write_text(TABLE)
    argv = [str(folder / "table.yaml"), "--preset", "smoke", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        reproduce.main(argv)
    return argv, folder / "out"


def test_the_page_has_all_parts(table):
    _, out = table
    page = (out / "table.md").read_text()
    assert "training helps: **reproduced** here" in page and "it recalls: **" in page and "not measured" not in page
    assert "| rules | 40 |" in page and "| garbled | 2 | 0 |" in page
    assert "Cosines of what enters and what leaves each layer of the base: 0." in page
    with (out / "table.csv").open() as file:
        found = {(row["row"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}
    for name in ("longer", "longer at first"):
        assert {measure for row, measure in found if row == name} >= {
            "recall/40",
            "recall/40/at 1",
            "eval/cross_entropy",
        }
    base = json.loads((out / "depth" / "starts" / "grown.json").read_text())["figures"]["eval/cross_entropy"]
    assert found["grown at first", "eval/cross_entropy"] == base > found["grown", "eval/cross_entropy"]
    assert (out / "plot.png").is_file()


def test_what_is_finished_is_kept(table, monkeypatch):
    argv, out = table
    before = (out / "table.md").read_text()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(out / "xla"))
    monkeypatch.setattr(yi_table, "_start", None)
    monkeypatch.setattr(yi_table, "recall_shares", None)
    monkeypatch.setattr(yi_table, "planted_corpus", None)
    reproduce.main(argv)
    assert (out / "table.md").read_text() == before


class Copies:
    """Names what stands behind the last place of the word that is asked for, where that is not too far back."""

    def __init__(self, reach):
        self.reach = reach

    def apply(self, params, tokens):
        asked, text = tokens[:, -1:], tokens[:, :-1]
        places = jnp.arange(text.shape[1])[None]
        found = jnp.argmax((text == asked) & (places >= text.shape[1] - self.reach), axis=1)
        answer = jnp.take_along_axis(tokens, found[:, None] + 1, axis=1)
        logits = jnp.where((found > 0)[:, None, None], jax.nn.one_hot(answer, 200), 0.0)
        return type("Output", (), {"logits": logits})


def test_shares_of_facts_that_are_named_right():
    grid = RecallGrid(words=(20, 60), depths=(0.1, 0.9), facts=3)
    figures = recall_shares(grid, 10, Copies(26), {}, story_tokenizer())
    assert figures["recall/20"] == 1 and figures["recall/20/error"] == 0
    assert figures["recall/60/at 0.1"] == 0 and figures["recall/60/at 0.9"] == 1
    assert figures["recall/60"] == 0.5 and figures["recall/60/error"] == pytest.approx(0.5 / 10**0.5)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("than: grown at first", "than: grown first", "must compare rows of this table"),
        ("depths: [0.0, 1.0]", "depths: [0.0, 2.0]", "depths must be 0 to 1"),
        ("words: [40]", "words: [3]", "twice the facts"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, before, after, message):
    (tmp_path / "table.yaml").write_text(TABLE.replace(before, after))
    with pytest.raises(InputError, match=message):
        reproduce.main([str(tmp_path / "table.yaml"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
