"""A table of training runs: every row from one base, the best learning rate shown, finished runs kept."""

import json

import pytest

from experiments import reproduce, train_table
from experiments.train_config import TrainConfig
from experiments.train_pages import answer
from experiments.train_table import TrainClaim, TrainTableConfig
from models.errors import InputError

TABLE = """
type: training
table: tiny
start:
  scratch: {layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 64}
  adapter: null
  data: {type: generated, tasks: [double], size: 40, test_size: 12}
  batch_size: 4
  length: 32
run:
  data: {type: generated, tasks: [larger], size: 40, test_size: 12}
  batch_size: 4
  length: 32
  evaluation: {batches: 2, max_new_tokens: 3}
rows:
  - {name: full, adapter: null, learning_rates: [1e-2]}
  - {name: xs, adapter: {type: lora_xs, rank: 2}, learning_rates: [1e-3, 1e-1], paper: "54.3"}
claims:
  - {text: fewer numbers are trained, row: xs, than: full, measure: size/trainable, below: true, factor: 0.5}
presets:
  smoke: {base_steps: 3, steps: 2, examples: 1}
"""

OPTIMIZER = "  optimizer: {schedule: constant, warmup: 0.0}\n  evaluation"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    (tmp_path / "table.yaml").write_text(TABLE)
    out = tmp_path / "out"
    return lambda *more: reproduce.main(
        [str(tmp_path / "table.yaml"), "--preset", "smoke", "--out", str(out), *more]
    ), out


def test_a_table_is_written_and_its_runs_are_kept(table, capsys, monkeypatch):
    run, out = table
    run()
    printed = capsys.readouterr().out
    assert "(kept)" not in printed and printed.count("exact match") >= 3
    assert {path.name for path in out.iterdir()} >= {"table.md", "table.csv", "plot.png", "config.yaml", "runs", "base"}
    page = (out / "table.md").read_text()
    assert "fewer numbers are trained: **reproduced** here" in page and "54.3" in page
    rates = {path.name: json.loads((path / "figures.json").read_text())["figures"] for path in (out / "runs").iterdir()}
    assert set(rates) == {"full-0.01", "xs-0.001", "xs-0.1"}
    best = min(rates["xs-0.001"], rates["xs-0.1"], key=lambda figures: figures["eval/loss"])
    assert f"| xs | {best['eval/loss']:.4f} |" in page
    assert rates["full-0.01"]["size/trainable"] > rates["xs-0.1"]["size/trainable"] == 2 * 2 * 7
    assert rates["full-0.01"]["size/step_bytes"] > rates["xs-0.1"]["size/step_bytes"] > 0
    run()
    assert capsys.readouterr().out.count("(kept)") == 3
    run("--presets.smoke.steps", "3")
    assert "(kept)" not in capsys.readouterr().out, "another number of updates is another run"
    assert not list((out / "runs").glob("*/checkpoints"))


def test_an_interrupted_table_goes_on(table, capsys, monkeypatch):
    run, out = table
    whole, done = train_table.run_cell, []

    def second_fails(*args):
        done.append(args)
        if len(done) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(train_table, "run_cell", second_fails)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(train_table, "run_cell", whole)
    run()
    assert capsys.readouterr().out.count("(kept)") == 1


def test_a_run_that_was_over_before_its_figures_were_kept(table, capsys, monkeypatch):
    """As after a kill between the last checkpoint and the figures."""
    run, out = table
    keep, taken = train_table.keep, []

    def killed(path, key, **values):
        taken.append(values["figures"])
        raise KeyboardInterrupt

    monkeypatch.setattr(train_table, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(train_table, "keep", keep)
    run()
    figures = json.loads((out / "runs" / "full-0.01" / "figures.json").read_text())["figures"]
    assert figures["eval/loss"] == pytest.approx(taken[0]["eval/loss"])
    (out / "runs" / "full-0.01" / "figures.json").write_text('{"key": "')
    capsys.readouterr()
    run()
    assert capsys.readouterr().out.count("(kept)") == 2, "damaged figures are measured again"


def test_another_base_gives_up_the_rows_that_started_from_the_old_one(table, capsys):
    run, out = table
    run()
    capsys.readouterr()
    run("--presets.smoke.base_steps", "2")
    printed = capsys.readouterr().out
    assert "training the model" in printed and "(kept)" not in printed


def test_a_rate_that_comes_to_nothing_does_not_end_the_table(table, tmp_path, capsys):
    run, out = table
    text = TABLE.replace("learning_rates: [1e-2]", "learning_rates: [1e30, 1e-2]").replace("  evaluation", OPTIMIZER)
    (tmp_path / "table.yaml").write_text(text)
    run()
    assert "loss inf" in capsys.readouterr().out
    assert "| full | inf" not in (out / "table.md").read_text()


def test_rows_need_names_of_their_own(table, tmp_path):
    run, _ = table
    (tmp_path / "table.yaml").write_text(TABLE.replace("name: xs", "name: full").replace("row: xs", "row: full"))
    with pytest.raises(InputError, match="names of their own"):
        run()


def test_what_rows_have_of_their_own_is_not_shared():
    with pytest.raises(ValueError, match="run.seed would not be read: every row has its own"):
        TrainTableConfig(run=TrainConfig(seed=3))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("steps: 2,", "steps: 0,", "must be at least 1"),
        ("examples: 1", "examples: 1, seeds: 0", "must be at least 1"),
        ("examples: 1", "examples: 1, rows: [ful]", "must choose among the rows of this table: full, xs"),
        ("batches: 2", "batches: 0", "told apart by their held-out loss"),
    ],
)
def test_settings_that_do_not_fit(table, tmp_path, before, after, message):
    run, out = table
    (tmp_path / "table.yaml").write_text(TABLE.replace(before, after))
    with pytest.raises(InputError, match=message):
        run()
    assert not out.exists()


def test_claims_are_answered_by_the_figures():
    rows = {"a": {"x": 1.0}, "b": {"x": 2.0}}
    claim = TrainClaim("a is small", "a", "b", "x", 0.6, below=True)
    assert "**reproduced**" in answer(claim, rows)
    assert "**not reproduced**" in answer(TrainClaim("a is small", "a", "b", "x", 0.4, below=True), rows)
    assert "**not reproduced**" in answer(TrainClaim("a is large", "a", "b", "x"), rows)
    noisy = {"a": {"x": 1.0, "x/error": 0.5}, "b": {"x": 2.0, "x/error": 0.5}}
    assert "**within the noise**" in answer(TrainClaim("a is small", "a", "b", "x", below=True), noisy)
    noisy["b"]["x"] = 3.0
    assert "**reproduced**" in answer(TrainClaim("a is small", "a", "b", "x", below=True), noisy)
    asked = {"a": {"eval/exact_match": 0.5}, "b": {"eval/exact_match": 0.4}}
    assert "**within the noise**" in answer(TrainClaim("a is better", "a", "b"), asked, 50)
    assert "**reproduced**" in answer(TrainClaim("a is better", "a", "b"), asked, 500)
    assert "**not measured**" in answer(TrainClaim("a is large", "a", "b", "y"), rows)
