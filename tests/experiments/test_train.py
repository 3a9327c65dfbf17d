"""A training run as a user starts it: its folder, killed and resumed, what is refused, what comes out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock

from experiments import train
from experiments.loading import Loader
from models import load_model
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
SMALL = """
scratch: {layers: 2, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 64}
adapter: null
data: {type: generated, tasks: [double, larger], size: 60, test_size: 12}
optimizer: {learning_rate: 1e-2}
steps: 8
batch_size: 4
length: 48
log_every: 1
evaluation: {every: 4, batches: 1, examples: 0, max_new_tokens: 4}
saving: {every: 2}
distributed: {num_processes: 1}  # JAX has been asked for devices already
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that trains in a folder with some flags, and gives {step: loss} of its metrics."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    (tmp_path / "small.yaml").write_text(SMALL)

    def train_in(name: str, *flags: str) -> dict[int, float]:
        argv = ["train", "--config", str(tmp_path / "small.yaml"), "--run_dir", str(tmp_path / name), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        train.main()
        return losses(tmp_path / name)

    return train_in


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    found = [(line["step"], line["train/loss"]) for line in lines(folder) if "train/loss" in line]
    assert len(dict(found)) == len(found), "a step is logged twice"
    return dict(found)


def test_a_run_leaves_its_folder(run, tmp_path, capsys):
    values = run("whole", "--evaluation.examples", "4")
    folder = tmp_path / "whole"
    assert sorted(values) == list(range(1, 9)) and values[8] < values[1]
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", ".lock", "metrics.jsonl", "tensorboard", "checkpoints", "model",
    }  # fmt: skip
    logged = {tag for line in lines(folder) for tag in line}
    assert logged >= {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/exact_match"}
    assert logged >= {"perf/tokens_per_second", "perf/step_seconds", "perf/compile_seconds"}
    assert "saved in" in capsys.readouterr().out
    model, params, tokenizer = load_model(folder / "model")
    assert tokenizer.decode(tokenizer.encode("double ab")) == "double ab" and model.config.num_layers == 2


def test_a_resumed_run_has_the_losses_of_a_whole_one_bit_for_bit(run, tmp_path):
    whole = run("whole")

    class Stop(Exception):
        pass

    def stop_at_five(self, step, metrics):
        original(self, step, metrics)
        if step == 5:
            raise Stop

    original = train_report().report
    train_report().report = stop_at_five
    try:
        with pytest.raises(Stop):
            run("parts")
    finally:
        train_report().report = original
    assert run("parts") == whole
    assert run("parts") == whole, "a finished run stays as it is"


def train_report():
    from experiments.train_report import Reporter

    return Reporter


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL at whatever moment: no step is lost but those since the last checkpoint."""
    longer = SMALL.replace("steps: 8", "steps: 100").replace("every: 4", "every: 0").replace("every: 2", "every: 5")
    (tmp_path / "small.yaml").write_text(longer)
    command = [sys.executable, "-m", "experiments.train", "--config", str(tmp_path / "small.yaml")]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}

    def start(name: str) -> subprocess.Popen:
        command_line = [*command, "--run_dir", str(tmp_path / name)]
        return subprocess.Popen(command_line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    for moment in (12, 40):
        process = start("killed")
        give_up = time.monotonic() + 120
        path = tmp_path / "killed" / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < give_up:
            if path.exists() and len(path.read_text().splitlines()) > moment:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert start("killed").wait(timeout=240) == 0 and start("whole").wait(timeout=240) == 0
    killed, whole = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert len(killed) == 100 and killed == whole


def test_an_adapter_is_saved_alone(run, tmp_path):
    model = write_tiny_folder(tmp_path / "model")
    rest = SMALL.partition("adapter: null")[2]
    (tmp_path / "small.yaml").write_text(f"model: {model}\nadapter: {{type: lora_sb, rank: 2}}{rest}")
    run("lora", "--steps", "3")
    assert sorted(run("lora", "--steps", "4")) == [1, 2, 3, 4], "a run goes on, with the factors that it has"
    assert (tmp_path / "lora" / "adapter").is_dir() and not (tmp_path / "lora" / "model").exists()
    loader = Loader(None)
    before = loader.model(str(model))[1]
    loader.adapt(str(model), tmp_path / "lora" / "adapter")
    after = loader.model(str(model))[1]
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert moved["layers_0"]["attention"]["q"]["kernel"] and not moved["embedding"]["embedding"]


def test_a_run_does_not_go_on_over_another_model(run, tmp_path):
    model = write_tiny_folder(tmp_path / "model", seed=1)
    rest = SMALL.partition("adapter: null")[2]
    (tmp_path / "small.yaml").write_text(f"model: {model}\nadapter: {{type: lora, rank: 2}}{rest}")
    run("lora", "--steps", "3")
    shutil.rmtree(model)
    write_tiny_folder(model, seed=2)
    with pytest.raises(InputError, match="lora started from another model; choose another run_dir"):
        run("lora", "--steps", "4")


def test_other_settings_do_not_go_on_with_a_run(run, tmp_path):
    run("run", "--steps", "2")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match="was started with another optimizer"):
        run("run", "--optimizer.beta2", "0.5")
    assert (tmp_path / "run" / "config.yaml").read_text() == before, "what is refused changes nothing"
    with pytest.raises(InputError, match="was started with another data"):
        run("run", "--data.size", "61")


def test_a_folder_of_other_things_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run("mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "mine" / "config.yaml").write_text("theirs: true\n")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run("mine")
    assert (tmp_path / "mine" / "config.yaml").read_text() == "theirs: true\n"


def test_a_folder_that_another_run_holds_is_refused(run, tmp_path):
    (tmp_path / "held").mkdir()
    with FileLock(tmp_path / "held" / ".lock"), pytest.raises(InputError, match="another run is writing to.*run_dir"):
        run("held")


def test_a_longer_plan_is_said(run, capsys):
    run("longer", "--steps", "2")
    run("longer", "--steps", "3", "--optimizer.learning_rate", "1e-4")
    assert "was planned for 2 updates and is now for 3" in capsys.readouterr().out
    run("longer", "--steps", "3")
    assert "planned" not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_good_checkpoints(run, tmp_path):
    with pytest.raises(
        InputError, match=r"(loss|grad norm) of update \d+ is (nan|inf).*good checkpoint is of update \d"
    ):
        run("nan", "--optimizer.learning_rate", "1e30", "--optimizer.warmup", "0", "--saving.every", "1")
    kept = [int(path.name) for path in (tmp_path / "nan" / "checkpoints").iterdir() if path.name.isdigit()]
    assert kept and max(kept) <= len(losses(tmp_path / "nan"))


def test_a_batch_that_does_not_divide(run):
    with pytest.raises(InputError, match="batch"):
        run("odd", "--batch_size", "3", "--accumulate", "2")


def test_bad_values_are_told_before_anything_is_loaded(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("bad", "--length", "1")
    assert "length must be at least 2" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_a_run_that_cannot_start_leaves_no_folder(run, tmp_path):
    with pytest.raises(InputError, match="unknown generated task"):
        run("bad", "--data.tasks", "doubel")
    assert not (tmp_path / "bad").exists()


def test_a_trace_is_written(run, tmp_path):
    run("traced", "--profile.start_step", "2", "--profile.num_steps", "2")
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))


def test_the_same_seed_gives_the_same_run_and_another_does_not(run):
    first, same, other = run("a", "--steps", "3"), run("b", "--steps", "3"), run("c", "--steps", "3", "--seed", "1")
    assert first == same and first[1] != other[1]
    assert np.isfinite(list(first.values())).all()


def test_a_model_with_an_encoder_is_trained_and_goes_on(run, tmp_path):
    """Two runs of which one is cut in halves have the same losses; answers are asked for."""
    pairs = (
        SMALL.replace("max_length: 64}", "max_length: 64, encoder_layers: 1}") + "packing: false\nsource_length: 40\n"
    )
    (tmp_path / "small.yaml").write_text(
        pairs.replace("learning_rate: 1e-2", "learning_rate: 1e-2, schedule: constant")
    )
    flags = ("--evaluation.examples", "4", "--optimizer.warmup", "0")
    whole = run("whole", *flags)
    run("parts", *flags, "--steps", "4")
    assert run("parts", *flags) == whole and whole[8] < whole[1]
    assert any("eval/exact_match" in line for line in lines(tmp_path / "parts"))
    model, _, tokenizer = load_model(tmp_path / "parts" / "model")
    assert model.config.encoder.num_layers == 1 and tokenizer.decode(tokenizer.encode("ab")) == "ab"


def test_what_only_one_kind_of_model_can_be_told(run, tmp_path):
    with pytest.raises(InputError, match="source_length is for models with an encoder"):
        run("bad", "--source_length", "40")
    pairs = SMALL.replace("max_length: 64}", "max_length: 64, encoder_layers: 1}")
    (tmp_path / "small.yaml").write_text(pairs)
    with pytest.raises(InputError, match="set packing to false"):
        run("bad")
    with pytest.raises(InputError, match="source_length 65 is more than the 64 tokens"):
        run("bad", "--source_length", "65", "--no-packing")
