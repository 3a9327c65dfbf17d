"""What models of a training table write: figures beside known answers, kept runs, settings that do not fit."""

import csv
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import reproduce, train_texts
from experiments.train_table import averaged
from experiments.train_texts import Continuations, TextMeasure, TextRow
from finetune.data_configs import StoriesData
from finetune.stories import story_tokenizer
from models.errors import InputError
from models.scratch import ScratchConfig, scratch_model

TABLE = """
type: training
table: tiny
start:
  scratch: {layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 64, tokenizer: stories}
  adapter: null
  data: {type: stories, size: 20, test_size: 4, words: 24}
  batch_size: 4
  length: 24
  evaluation: {every: 0, examples: 0}
run:
  data: {type: stories, size: 8, test_size: 4, words: 24}
  optimizer: {schedule: constant, warmup: 0.0, weight_decay: 0.0}
  batch_size: 4
  length: 24
  evaluation: {batches: 1}
rows:
  - {name: full, adapter: null, learning_rates: [1e-1]}
  - {name: lora, adapter: {type: lora, rank: 2}, learning_rates: [1e-3]}
texts:
  - {name: before, paper: "0.17"}
  - {name: sampled, of: full, temperature: 1.0}
  - {name: adapted, of: lora}
  - {name: as_sharp, sharp_as: full}
continuations: {read: 6, new_tokens: 8, batch_size: 3}
claims:
  - {text: training sharpens, row: sampled, than: before, measure: entropy, below: true}
presets:
  smoke: {base_steps: 2, steps: 6, examples: 4, seeds: 2}
"""


def run(tmp_path, *more, table=TABLE):
    (tmp_path / "table.yaml").write_text(table)
    reproduce.main([str(tmp_path / "table.yaml"), "--preset", "smoke", "--out", str(tmp_path / "out"), *more])


def test_trained_models_write_texts_that_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    run(tmp_path)
    out = tmp_path / "out"
    page = (out / "table.md").read_text()
    assert "## What the models write" in page and "training sharpens: **reproduced** here" in page
    assert "exact match" not in page + capsys.readouterr().out, "nothing is asked"
    with (out / "table.csv").open() as file:
        figures = {(row["row"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}
    assert figures["sampled", "entropy"] < 0.99 * figures["before", "entropy"]
    assert figures["as_sharp", "entropy"] == pytest.approx(figures["sampled", "entropy"], rel=0.01)
    assert figures["sampled", "fit"] < figures["before", "fit"], "training texts are known better"
    assert figures["before", "entropy/error"] == 0 < figures["sampled", "entropy/error"], "seeds train in another order"
    assert " ± " in page
    kept = json.loads((out / "texts" / "before-0.json").read_text())
    assert len(kept["texts"]) == 4 and all(len(text.split()) == 6 + 8 for text in kept["texts"])

    def measured_again(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(train_texts.TextMeasure, "_measure", measured_again)
    run(tmp_path)
    assert (out / "table.md").read_text() == page
    with pytest.raises(AssertionError, match="measured again"):
        run(tmp_path, "--continuations.new_tokens", "7")


def test_greedy_texts_are_those_of_the_model(tmp_path):
    """Figures of a model whose text is known: one that was never trained repeats itself word for word."""
    tokenizer = story_tokenizer()
    shape = ScratchConfig(layers=1, width=16, heads=2, kv_heads=1, mlp_width=24, max_length=64, tokenizer="stories")
    model = scratch_model(shape, tokenizer.vocab_size)
    loaded = model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"], tokenizer
    data = StoriesData(size=3, test_size=2, words=20)
    measure = TextMeasure(Continuations(4, 12), data, 20, 5, lambda name: loaded, tmp_path)
    figures = measure(TextRow(), 0, "")
    texts = json.loads((tmp_path / "greedy-0.json").read_text())["texts"]
    assert len(texts) == 2, "there are no more held-out texts"
    words = [text.split()[4:] for text in texts]
    assert figures["type_token_ratio"] == pytest.approx(sum(len(set(text)) / 12 for text in words) / 2)
    assert figures["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=0.1)
    assert figures["temperature"] == 0
    long = TextMeasure(Continuations(20, 12), data, 20, 5, lambda name: loaded, tmp_path)
    with pytest.raises(InputError, match="no held-out text has more than the 20 tokens"):
        long(TextRow(), 0, "")


def test_means_come_with_their_errors():
    assert averaged([{"x": 1.0}]) == {"x": 1.0}
    assert averaged([{"x": 1.0}, {"x": 3.0}]) == {"x": 2.0, "x/error": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("of: full", "of: ful", "must be of rows that are trained: base, full, lora"),
        ("name: sampled", "name: lora", "names of their own"),
        ("sharp_as: full", "sharp_as: full, temperature: 0.5", "leave temperature out"),
        ("temperature: 1.0", "temperature: -1.0", "must not be negative"),
        ("read: 6", "read: 0", "at least 1"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, before, after, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, table=TABLE.replace(before, after, 1))
    assert not (tmp_path / "out").exists()
