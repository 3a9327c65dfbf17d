"""The files that a run leaves for people: metrics.jsonl and TensorBoard."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from finetune.run_log import RunLog
from models.errors import InputError


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """Returns every event of the TensorBoard files: records of length u64, checksum u32, data, checksum u32."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_figures_go_to_both_files(tmp_path, capsys):
    with RunLog(tmp_path, 0, 20) as log:
        log.text("config", "steps: 20")
        log.figures(10, {"train/loss": 1.5, "perf/step_seconds": 0.25})
        log.figures(20, {"train/loss": 1.25, "eval/loss": 2.0})
    assert lines(tmp_path)[0] == {"step": 10, "train/loss": 1.5, "perf/step_seconds": 0.25}
    scalars = {
        (e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value if "config" not in v.tag
    }
    assert scalars[10, "train/loss"] == 1.5 and scalars[20, "eval/loss"] == 2.0
    assert any("steps: 20" in str(v.tensor) for e in events(tmp_path) for v in e.summary.value)
    assert "step 10/20  loss 1.5" in capsys.readouterr().out


def test_a_run_that_goes_on_writes_each_step_once(tmp_path):
    with RunLog(tmp_path, 0, 30) as log:
        for step in (10, 20, 30):
            log.figures(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "train/lo')  # killed while writing
    with RunLog(tmp_path, 15, 30) as log:
        log.figures(20, {"train/loss": -20.0})
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(10, 10.0), (20, -20.0)]
    assert any(event.session_log.status and event.step == 16 for event in events(tmp_path))


def test_other_processes_write_nothing(tmp_path):
    with RunLog(tmp_path, 0, 10, active=False) as log:
        log.figures(10, {"train/loss": 1.0})
        log.say("hello")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot write to"):
        RunLog(tmp_path / "missing", 0, 10)
