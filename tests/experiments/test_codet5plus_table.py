"""CodeT5+'s table on a tiny model, and runs of its losses that are stopped, joined to a decoder, or do not fit."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import codet5plus_table, reproduce
from experiments.codet5plus_table import CodeRow, CodeT5PlusTableConfig, stages
from experiments.config import load_config
from experiments.train import describe
from experiments.train_config import TrainConfig
from experiments.training import run_training
from models.errors import InputError
from models.joined import JoinConfig
from models.weights.load import load_model

SHAPE = (
    "{layers: 1, encoder_layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 72, tokenizer: code, "
    "embedding_width: 8, matching: true}"
)
RUN = """
    adapter: null
    data: {type: code, size: 24, test_size: 0}
    batch_size: 4
    length: 48
    source_length: 28
    packing: false
    evaluation: {every: 0, batches: 0, examples: 0}
"""
TABLE = f"""
type: codet5plus
table: codet5plus
first:
    scratch: {SHAPE}
    objective: {{type: codet5plus, losses: [complete]}}
{RUN}
second:
    objective: {{type: codet5plus, losses: [contrastive, match], queue: 8}}
{RUN}
rows:
  - {{name: both, paper: "77.4"}}
  - {{name: contrast alone, second: [contrastive]}}
top: 2
new_tokens: 4
presets: {{smoke: {{first_steps: 1, second_steps: 2, pairs: 5, answers: 2}}}}
claims:
  - {{text: matching helps, row: both, than: contrast alone, measure: mrr}}
  - {{text: it ranks again, row: both, than: contrast alone, measure: reranked/mrr}}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codet5plus")
    (folder / "table.yaml").write_text(TABLE)
    argv = [str(folder / "table.yaml"), "--preset", "smoke", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        reproduce.main(argv)
    return argv, folder / "out"


def test_the_page_and_what_is_kept(table, monkeypatch):
    argv, out = table
    page = (out / "table.md").read_text()
    assert "matching helps: **" in page and "not measured" not in page and "| 77.4 |" in page
    with (out / "table.csv").open() as file:
        found = {(row["row"], row["measure"]): float(row["value"]) for row in csv.DictReader(file)}
    for name in ("mrr", "reranked/recall", "cross_entropy", "exact", "completed", "second/completed"):
        assert ("both", name) in found
    assert found["both", "first/loss"] == found["contrast alone", "first/loss"]  # one run for both rows
    assert len(list((out / "first").iterdir())) == 1 and len(list((out / "second").iterdir())) == 2
    assert (out / "plot.png").is_file()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(out / "xla"))
    monkeypatch.setattr(codet5plus_table, "_asked", None)
    monkeypatch.setattr(codet5plus_table, "_trained", None)
    reproduce.main(argv)
    assert (out / "table.md").read_text() == page


def test_rows_choose_their_losses():
    config = CodeT5PlusTableConfig()
    first, second = stages(config, CodeRow(first=("denoise",), second=("match",), hard_negatives=False))
    assert first.objective.losses == ("denoise",) and second.objective.losses == ("match",)
    assert first.objective.hard_negatives and not second.objective.hard_negatives
    assert second.model == str(first.run_dir / "model") and second.scratch is None
    assert stages(config, CodeRow())[1].run_dir != second.run_dir


def run_config(tmp_path, name, *more):
    path = tmp_path / f"{name}.yaml"
    path.write_text(f"scratch: {SHAPE}\nobjective: {{type: codet5plus, losses: [contrastive], queue: 8}}\n" + "\n".join(
        line.strip() for line in RUN.splitlines()) + "\nsaving: {every: 1}\nlog_every: 1\nsteps: 3\n")  # fmt: skip
    argv = ["--config", str(path), "--run_dir", str(tmp_path / name), *more]
    return load_config(TrainConfig, argv, prog="test", description="")


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row}


def test_a_run_that_is_stopped_goes_on_to_the_same_losses(tmp_path):
    straight = run_config(tmp_path, "straight")
    run_training(straight)
    halted = run_config(tmp_path, "halted", "--steps", "1", "--optimizer.schedule", "constant")
    whole = dataclasses.replace(halted, steps=3)
    run_training(halted)
    run_training(whole)
    alone = dataclasses.replace(whole, run_dir=tmp_path / "alone")
    run_training(alone)
    assert losses(tmp_path / "halted") == losses(tmp_path / "alone") and len(losses(tmp_path / "alone")) == 3


def test_a_small_encoder_is_trained_in_front_of_a_model_that_stays(tmp_path):
    """Two new decoders, joined; what stays is bit for bit what it was, in the folder too."""
    shape = "{layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 72, tokenizer: code}"
    path = tmp_path / "part.yaml"
    path.write_text(f"scratch: {shape}\nadapter: null\ndata: {{type: code, size: 8, test_size: 0}}\nsteps: 1\n"
                    "batch_size: 2\nlength: 72\nevaluation: {batches: 0, examples: 0}\n")  # fmt: skip
    part = load_config(
        TrainConfig, ["--config", str(path), "--run_dir", str(tmp_path / "one")], prog="t", description=""
    )
    run_training(part)
    own = str(tmp_path / "one" / "model")
    both = dataclasses.replace(
        part, model=own, scratch=None, join=JoinConfig(own), packing=False, steps=3, run_dir=tmp_path / "both"
    )
    assert "bridge" not in describe(both) and "cross" in describe(both)
    run_training(both)
    before, after = load_model(own).params, load_model(str(tmp_path / "both" / "model")).params
    flat = flatten_dict(after["decoder"], sep="/")
    for name, value in flatten_dict(before, sep="/").items():
        np.testing.assert_array_equal(flat[name], value)
    assert float(flat["layers_0/cross_gate"]) != 0
    with pytest.raises(InputError, match="reads other tokens than"):
        byte = dataclasses.replace(part.scratch, tokenizer="bytes", max_length=256)
        run_training(dataclasses.replace(part, scratch=byte, length=256, run_dir=tmp_path / "bytes"))
        run_training(dataclasses.replace(
            both, join=JoinConfig(str(tmp_path / "bytes" / "model")), run_dir=tmp_path / "no"))  # fmt: skip
    with pytest.raises(ValueError, match="trains the encoder"):
        dataclasses.replace(part, join=JoinConfig(own))


def test_sizes_of_a_run_are_told_without_it(tmp_path):
    text = describe(run_config(tmp_path, "sizes"))
    assert "objective, frozen" in text and "projection/kernel" in text


WRONG = {
    "a queue of 6 is not a multiple of the batch of 4 rows": {"objective": {"queue": 6}},
    "set accumulate to 1, not 2": {"accumulate": 2},
    "needs a model with a head": {"scratch": {"matching": False}, "objective": {"losses": ("match",)}},
    r"the tokenizer has no \[CLS\]": {
        "scratch": {"tokenizer": "bytes", "max_length": 256},
        "length": 200,
        "source_length": 150,
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_runs_that_do_not_fit(tmp_path, message):
    config = run_config(tmp_path, "wrong")
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in WRONG[message].items()
    }
    with pytest.raises(InputError, match=message):
        run_training(dataclasses.replace(config, **parts))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("than: contrast alone", "than: none", "must compare rows of this table"),
        ("pairs: 5", "pairs: 1", "and pairs 2"),
        ("name: contrast alone", "name: both", "names of their own"),
        ("top: 2", "top: 0", "top and new_tokens"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, before, after, message):
    (tmp_path / "table.yaml").write_text(TABLE.replace(before, after))
    with pytest.raises(InputError, match=message):
        reproduce.main([str(tmp_path / "table.yaml"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
