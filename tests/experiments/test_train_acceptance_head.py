"""The main that trains heads, and the mains that use what it saves, on a tiny model."""

import json
import re

import pytest
import safetensors

from decoding.speculative.head_kinds import HEADS
from experiments import decode, reproduce, train_acceptance_head
from experiments.questions import Question
from experiments.train_acceptance_head import split
from models.errors import InputError
from tests.support.mains import call_main
from tests.support.tiny_folder import write_tiny_folder

TRAIN = "{max_new_tokens: 6, batch_size: 1, epochs: 2, places: 4}"
TABLE = """
table: tiny
rows:
  - {name: plain}
  - {name: stopped, method: specdec_pp, draft: true, options: {longest: 3}, head: HEAD, train: TRAIN}
presets:
  smoke: {per_task: 1, max_new_tokens: 8}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two models, six questions, a training config and a table."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    write_tiny_folder(tmp_path / "model")
    write_tiny_folder(tmp_path / "draft")
    lines = [json.dumps({"question_id": i, "category": "qa", "turns": [f"{i} and"]}) for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (tmp_path / "train.yaml").write_text(TRAIN)
    head, train = tmp_path / "heads" / "head.safetensors", tmp_path / "train.yaml"
    (tmp_path / "table.yaml").write_text(TABLE.replace("HEAD", str(head)).replace("TRAIN", str(train)))
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Runs a main with the folder's models; returns (exit code, stdout, stderr)."""

    def run(main, *flags: str, draft: str = "draft") -> tuple[int, str, str]:
        models = ["--model", str(folder / "model"), "--draft", str(folder / draft)]
        return call_main(monkeypatch, capsys, main, *flags, *models)

    return run


def test_training_then_decoding(run, folder):
    head = folder / "heads" / "head.safetensors"
    flags = ["--config", str(folder / "train.yaml"), "--questions", str(folder / "questions.jsonl"), "--out", str(head)]
    code, out, _ = run(train_acceptance_head.main, *flags)
    assert code == 0 and re.search(r"dev KL \d\.\d+ before training, \d\.\d+ after", out) and f"saved in {head}" in out
    assert "train: 3/3 texts" in out and "epoch   2" in out and "ECE" in out
    assert [path.name for path in head.parent.iterdir()] == [head.name]
    with safetensors.safe_open(head, framework="numpy") as file:
        facts = file.metadata()
    assert (facts["target"], facts["draft"], facts["depth"]) == ("model", "draft", "3")
    assert json.loads(facts["figures"])["dev_kl"] >= 0 and "max_new_tokens: 6" in facts["config"]

    flags = ["--prompt", "abc", "--method", "specdec_pp", "--options.longest", "3", "--max_new_tokens", "8"]
    code, out, _ = run(decode.main, *flags, "--head", str(head), "--output", "json")
    assert code == 0 and json.loads(out)["stats"]["accepted"] > 0
    for more, draft, words in (
        ([], "draft", "--head FILE on the command line"),
        (["--head", str(folder / "none")], "draft", "no such head"),
        (
            ["--head", str(head), "--method", "rsd_c"],
            "draft",
            f"has no use for a head: leave out --head, or use {', '.join(HEADS)}, specdec_pp",
        ),
        (["--head", str(head)], "model", "is a head for draft 'draft', not for 'model'"),
    ):
        code, _, err = run(decode.main, *flags, *more, draft=draft)
        assert code == 2 and words in err and "Traceback" not in err


def test_a_table_trains_the_head_it_lacks(run, folder, capsys):
    flags = ["--preset", "smoke", "--model", str(folder / "model"), "--draft", str(folder / "draft")]
    flags += ["--out", str(folder / "out"), "--questions", str(folder / "questions.jsonl")]
    table = str(folder / "table.yaml")
    text = (folder / "train.yaml").read_text()
    (folder / "train.yaml").write_text(text.replace("{", f"{{questions: {folder / 'questions.jsonl'}, "))
    reproduce.main([table, *flags])
    first = capsys.readouterr().out
    assert "training the head" in first and first.count("(kept)") == 0 and "1/2 qa" in first
    reproduce.main([table, *flags])
    again = capsys.readouterr().out
    assert "training the head" not in again and again.count("(kept)") == 2
    (folder / "heads" / "head.safetensors").unlink()
    (folder / "train.yaml").write_text((folder / "train.yaml").read_text().replace("epochs: 2", "epochs: 1"))
    reproduce.main([table, *flags])
    assert capsys.readouterr().out.count("(kept)") == 0, "what another head did, and plain beside it"
    (folder / "table.yaml").write_text((folder / "table.yaml").read_text().replace("draft: true, ", ""))
    with pytest.raises(InputError, match="'stopped' has a head, which belongs to a draft"):
        reproduce.main([table, *flags])


def test_no_question_serves_two_purposes():
    questions = [Question(f"{task} {i}", task, ("x",)) for task in ("qa", "math") for i in range(10)]
    parts = split(questions, None)
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "dev": 4, "test": 4}
    assert sorted(q.id for part in parts.values() for q in part) == sorted(q.id for q in questions)
    assert {"qa 0", "qa 5", "math 0", "math 5"} == {q.id for q in parts["test"]}, "what small tables measure on"
    assert {name: len(part) for name, part in split(questions, 1).items()} == {"train": 2, "dev": 2, "test": 2}
    with pytest.raises(InputError, match="none left for train"):
        split(questions[:2], None)


def test_bad_settings_are_one_message(run, folder):
    questions = ["--questions", str(folder / "questions.jsonl")]
    for flags, words in (
        (["--weight", "0"], "weight and learning_rate must be above 0"),
        (["--per_task", "0"], "batch_size and"),
        (["--mix", "1.0"], "mix is the chance"),
        (["--out", "/proc/nowhere/head.safetensors"], "cannot write to /proc/nowhere"),
    ):
        code, _, err = run(train_acceptance_head.main, *questions, *flags)
        assert code == 2 and words in err and "Traceback" not in err
