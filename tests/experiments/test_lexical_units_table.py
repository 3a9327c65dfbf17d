"""From texts that a tiny model writes to a model that writes several tokens per pass, beside the untouched one."""

import csv
import json

import pytest

from experiments import reproduce, train
from tests.support.mains import call_main
from tests.support.tiny_folder import write_tiny_folder

FREE = 7  # a byte that the tiny model does not write
GENERATE = "{train: 6, calibration: 2, test: 2, max_new_tokens: 12, batch_size: 10, temperature: 1.0}"
TRAIN = f"""
adapter: null
objective: {{type: lexical_unit, longest: 3, placeholder: {FREE}, confidence: 0.0}}
data: {{type: own_texts, texts: TEXTS, generate: GENERATE}}
optimizer: {{learning_rate: 3e-2, schedule: constant}}
steps: 3
batch_size: 2
length: 160
evaluation: {{batches: 1, examples: 0}}
distributed: {{num_processes: 1}}  # JAX has been asked for devices already
"""
TABLE = f"""
table: tiny
generate: [words]
rows:
  - {{name: plain}}
  - {{name: trained, model: MODEL, train: TRAIN}}
  - name: sure
    method: lexical_unit
    options: {{longest: 3, placeholder: {FREE}, threshold: 1.0}}
    model: MODEL
    train: TRAIN
  - name: daring
    method: lexical_unit
    options: {{longest: 3, placeholder: {FREE}, threshold: 0.001, repeats: true}}
    model: MODEL
    train: TRAIN
claims:
  - {{text: Daring writes more, row: daring, than: sure}}
  - {{text: Daring agrees more, row: daring, than: sure, measure: agreement}}
presets:
  smoke: {{per_task: 2, max_new_tokens: 12}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, another one, and the configs."""
    folder = tmp_path_factory.mktemp("units")
    write_tiny_folder(folder / "model", max_length=512)
    write_tiny_folder(folder / "other", max_length=512, seed=2)
    (folder / "generate.yaml").write_text(GENERATE)
    paths = {"TEXTS": "texts", "GENERATE": "generate.yaml", "MODEL": "run/model", "TRAIN": "train.yaml"}
    for name, text in (("train.yaml", TRAIN), ("table.yaml", TABLE)):
        for word, path in paths.items():
            text = text.replace(f": {word}", f": {folder / path}")
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Runs a main; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    return lambda main, *flags: call_main(monkeypatch, capsys, main, *flags)


def test_a_table_writes_texts_trains_on_them_and_compares_with_the_untouched_model(run, folder):
    flags = [folder / "table.yaml", "--preset", "smoke", "--model", folder / "model", "--out", folder / "out"]
    code, out, err = run(reproduce.main, *flags)
    assert code == 0, err
    assert out.index("training the model") < out.index("generating texts first") < out.index("10/10 texts")
    tags = {tag for line in (folder / "run" / "metrics.jsonl").read_text().splitlines() for tag in json.loads(line)}
    assert tags >= {"train/in_units", "train/placeholder_loss", "eval/loss"}
    with (folder / "out" / "table.csv").open() as file:
        found = {(r["row"], r["measure"]): float(r["value"]) for r in csv.DictReader(file) if r["task"] == "all"}
    assert found["plain", "same"] == found["plain", "agreement"] == 1
    assert found["trained", "agreement"] < 1, "the weights have moved"
    own = ("same", "agreement", "correct", "new_tokens")
    assert [found["trained", name] for name in own] == [found["sure", name] for name in own]
    assert found["sure", "mat"] == 1 < found["daring", "mat"]
    assert "Daring writes more: **reproduced**" in out and "before the first other token" in out
    code, out, err = run(reproduce.main, *flags)
    assert code == 0 and out.count("(kept)") == 4 and "training" not in out, "nothing is done again"


def test_what_cannot_be_trained_is_said(run, folder):
    """Of the texts of the test before: the placeholder in them, another model's, no folder."""
    flags = ["--config", folder / "train.yaml", "--model", folder / "model", "--run_dir", folder / "no"]
    code, _, err = run(train.main, *flags, "--objective.placeholder", "68")
    assert code == 2 and "placeholder 68 ('e') is a token of the training texts" in err
    assert "; 3 ('$') is free: set objective.placeholder to it" in err
    code, _, err = run(train.main, *flags[:3], folder / "other", *flags[4:])
    assert code == 2 and "were written by 'model'" in err and "not by 'other'" in err
    (folder / "none.yaml").write_text(TRAIN.replace(": TEXTS", f": {folder / 'none'}").replace(": GENERATE", ": null"))
    code, _, err = run(train.main, "--config", folder / "none.yaml", *flags[2:])
    assert code == 2 and "cannot read the texts" in err and "experiments.generate" in err
    (folder / "new.yaml").write_text("scratch: {layers: 1}" + TRAIN)
    code, _, err = run(train.main, "--config", folder / "new.yaml", *flags[2:])
    assert code == 2 and "own_texts are what `model` writes as it is" in err
    table = ["--config", folder / "table.yaml", "--preset", "smoke", "--model", folder / "model"]
    (folder / "table.yaml").write_text((folder / "table.yaml").read_text().replace("run/model", "run/none"))
    code, _, err = run(reproduce.main, *table, "--out", folder / "out2")
    assert code == 2 and "no such model" in err and "python -m experiments.train" in err
    assert not (folder / "no").exists()
