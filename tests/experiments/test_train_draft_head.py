"""From texts that a tiny model writes to a head that drafts for it, through the mains."""

import json
import shutil

import pytest

from experiments import decode, generate, reproduce, train_draft_head
from experiments.chat_prompts import chat_prompts
from finetune.saved_heads import load_draft_head
from finetune.self_texts import SPLITS
from tests.support.mains import call_main
from tests.support.tiny_folder import write_tiny_folder

GENERATE = "{train: 6, calibration: 2, test: 2, max_new_tokens: 12, batch_size: 4, temperature: 1.0}"
TRAIN = (
    "{head: {type: medusa, offsets: 2, form: block}, steps: 4, batch_size: 2, evaluate_every: 2, saving: {every: 3}}"
)
TABLE = """
table: tiny
rows:
  - {name: plain}
  - {name: medusa_4, method: medusa, options: {nodes: 4}, head: HEAD, train: TRAIN}
presets:
  smoke: {per_task: 1, max_new_tokens: 8}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and the configs."""
    folder = tmp_path_factory.mktemp("heads")
    write_tiny_folder(folder / "model", max_length=192)
    (folder / "generate.yaml").write_text(GENERATE)
    (folder / "train.yaml").write_text(TRAIN.replace("{head", f"{{texts: {folder / 'texts'}, head", 1))
    line = json.dumps({"question_id": 1, "category": "qa", "turns": ["why"]})
    (folder / "questions.jsonl").write_text(line)
    head, train = folder / "table" / "head.safetensors", folder / "train.yaml"
    (folder / "table.yaml").write_text(TABLE.replace("HEAD", str(head)).replace("TRAIN", str(train)))
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Runs a main on the folder's model; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))

    def run(main, *flags, model="model") -> tuple[int, str, str]:
        return call_main(monkeypatch, capsys, main, *flags, "--model", folder / model)

    return run


def metrics(path) -> list[dict]:
    """The lines of a run, without what its clock says."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def test_texts_then_a_head_then_drafts(run, folder):
    flags = ["--config", folder / "generate.yaml", "--out", folder / "texts"]
    code, out, err = run(generate.main, *flags)
    assert code == 0, err
    assert "10/10 texts; " in out and f"saved in {folder / 'texts'}" in out
    texts = (folder / "texts" / "texts.jsonl").read_text()
    (folder / "texts" / "texts.jsonl").write_text(texts[: len(texts) // 2])
    train = ["--config", folder / "train.yaml", "--run_dir"]
    code, _, err = run(train_draft_head.main, *train, folder / "run")
    assert code == 2 and "is cut short" in err and not (folder / "run").exists()
    code, out, _ = run(generate.main, *flags)
    assert code == 0 and "hidden states are there already" in out
    whole = sorted(texts.splitlines()[1:])
    assert sorted((folder / "texts" / "texts.jsonl").read_text().splitlines()[1:]) == whole, "the same texts again"

    code, out, err = run(train_draft_head.main, *train, folder / "run")
    assert code == 0, err
    assert "medusa for model: 544 trained numbers" in out and "mat_16" in out
    names = {path.name for path in (folder / "run").iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "head.safetensors"}
    head = load_draft_head(folder / "run" / "head.safetensors", None, "medusa")
    assert head.figures["parameters"] == 544 and len(head.accuracy) == 2 and head.figures["mat_63"] >= 1
    code, _, _ = run(train_draft_head.main, *train, folder / "cut", "--steps", "4")
    assert code == 0 and metrics(folder / "cut" / "metrics.jsonl") == metrics(folder / "run" / "metrics.jsonl")

    flags = [
        "--prompt",
        "abc",
        "--method",
        "medusa",
        "--max_new_tokens",
        "8",
        "--output",
        "json",
        "--options.nodes",
        "4",
    ]
    code, out, err = run(decode.main, *flags, "--head", folder / "run" / "head.safetensors")
    assert code == 0, err
    assert json.loads(out)["stats"]["drafted"] > 0
    code, plain, _ = run(decode.main, *flags[:2], *flags[4:-2])
    assert json.loads(plain)["token_ids"] == json.loads(out)["token_ids"]
    code, _, err = run(decode.main, *flags)
    assert code == 2 and "name its file with --head" in err and "configs/train/medusa.yaml" in err


def test_a_run_goes_on_to_the_same_figures(run, folder, monkeypatch):
    """Killed behind the checkpoint of update 3: what follows it is what an unbroken run has."""
    train = ["--config", folder / "train.yaml", "--run_dir", folder / "broken"]

    class Killed(Exception):
        pass

    measure, calls = train_draft_head.HeadRun.measure, []

    def killed(self, values):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return measure(self, values)

    monkeypatch.setattr(train_draft_head.HeadRun, "measure", killed)
    with pytest.raises(Killed):
        run(train_draft_head.main, *train)
    monkeypatch.setattr(train_draft_head.HeadRun, "measure", measure)
    code, _, err = run(train_draft_head.main, *train, "--seed", "1")
    assert code == 2 and "was started with another seed: 0, now 1" in err
    code, _, err = run(train_draft_head.main, *train)
    assert code == 0, err
    whole = metrics(folder / "run" / "metrics.jsonl")
    assert metrics(folder / "broken" / "metrics.jsonl") == whole


def test_prompt_tokens_are_trained_on_places_drawn_at_random(run, folder):
    """Two updates at once, and one after the other: the places of an update are its own."""
    (folder / "ppd.yaml").write_text(
        f"{{texts: {folder / 'texts'}, head: {{type: ppd, offsets: 2}}, steps: 2, batch_size: 2, evaluate_every: 2, "
        "loss: {hard: 0.0, soft: 1.0, places: 3}, saving: {every: 1}}"
    )
    flags = ["--config", folder / "ppd.yaml", "--run_dir"]
    code, out, err = run(train_draft_head.main, *flags, folder / "ppd")
    assert code == 0, err
    head = load_draft_head(folder / "ppd" / "head.safetensors", None, "ppd")
    assert head.values["prompts"].shape == (2, 1, 16) and head.figures["parameters"] == 32
    whole = metrics(folder / "ppd" / "metrics.jsonl")
    shutil.rmtree(folder / "ppd" / "checkpoints" / "2")
    code, _, err = run(train_draft_head.main, *flags, folder / "ppd")
    assert code == 0, err
    assert whole and metrics(folder / "ppd" / "metrics.jsonl") == whole


def test_a_table_trains_the_head_it_lacks(run, folder):
    flags = ["--config", folder / "table.yaml", "--preset", "smoke", "--out", folder / "out"]
    flags += ["--questions", folder / "questions.jsonl"]
    code, out, err = run(reproduce.main, *flags)
    assert code == 0, err
    assert "training the head" in out and "## Draft heads" in out and "| table (medusa) | 544 |" in out
    code, out, _ = run(reproduce.main, *flags)
    assert code == 0 and "training the head" not in out and out.count("(kept)") == 2


def test_heads_and_texts_of_another_model_are_refused(run, folder):
    write_tiny_folder(folder / "another", max_length=192, seed=2)
    head = folder / "run" / "head.safetensors"
    flags = ["--prompt", "abc", "--method", "medusa", "--max_new_tokens", "4", "--head", head]
    code, _, err = run(decode.main, *flags, model="another")
    assert code == 2 and "belongs to 'model'" in err and "not to 'another'" in err
    train = ["--config", folder / "train.yaml", "--run_dir", folder / "refused"]
    code, _, err = run(train_draft_head.main, *train, model="another")
    assert code == 2 and "were written by 'model'" in err and not (folder / "refused").exists()


def test_prompts_of_one_split_are_about_nothing_of_another():
    counts = {"train": 500, "calibration": 100, "test": 100}
    prompts = chat_prompts(counts)
    assert [prompt.split for prompt in prompts] == [split for split in SPLITS for _ in range(counts[split])]
    texts = {split: {prompt.text for prompt in prompts if prompt.split == split} for split in SPLITS}
    assert all(len(texts[split]) == counts[split] for split in SPLITS), "all different"
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["calibration"]
    assert chat_prompts({"train": 20})[:20] == prompts[:20]
    many = chat_prompts({"test": 400})
    assert {prompt.again for prompt in many} >= {0, 1} and many != chat_prompts({"test": 400}, seed=1)
