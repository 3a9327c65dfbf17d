import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bench, bench_train
from experiments.bench_decoding import BenchConfig
from experiments.bench_process import Repeat, Side
from experiments.bench_train import TrainBenchConfig, drawn_batches, summarise
from experiments.runtime import run_main
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

CONFIG = TrainBenchConfig(batch_size=2, length=10, steps=3, repeats=3)


def test_last_line_is_json_with_the_promised_keys(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr(bench_train.importlib.util, "find_spec", lambda name: None)
    model = write_tiny_folder(tmp_path / "tiny")
    sizes = ["--batch_size", "2", "--length", "8", "--rank", "2", "--steps", "2", "--repeats", "2"]
    sizes += ["--out", str(tmp_path / "page")]
    monkeypatch.setattr(sys, "argv", ["bench", "--type", "train", "--model", str(model), *sizes])
    run_main(bench.main)
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["speedup_vs_peft"] is None and result["peak_memory_ratio"] is None and "parity" in out[0]
    assert result["tokens_per_second"] == pytest.approx(16 / result["step_seconds"])
    assert result["peak_memory_gb"] > 0.01 and 0 < result["host_share"] < 2
    assert "rank 2 on every linear layer" in (tmp_path / "page" / "table.md").read_text()
    assert out[1].startswith("fleetlm  seconds per update: ") and out[1].count(",") == 1


def test_summary_is_the_ratio_of_medians_over_equal_token_counts():
    ours = [Repeat(s, 0.1, ()) for s in (6.0, 60.0, 6.0)]
    theirs = [Repeat(s, 1.0, ()) for s in (9.0, 9.0, 1.0)]
    result = summarise(CONFIG, [ours, theirs], [10**9, 4 * 10**9])
    assert result["speedup_vs_peft"] == pytest.approx(1.5) and result["peak_memory_ratio"] == pytest.approx(0.25)
    assert result["tokens_per_second"] == pytest.approx(10.0) and result["step_seconds"] == pytest.approx(2.0)
    assert result["peft_tokens_per_second"] == pytest.approx(60 / 9)
    assert result["host_share"] == pytest.approx(0.1 / 6)


def test_both_sides_draw_the_same_tokens_and_new_ones_each_update():
    mine, theirs = drawn_batches(CONFIG, 50), drawn_batches(CONFIG, 50)
    first, again, other = mine(0), theirs(0), mine(1)
    assert first.tokens.shape == (1, 2, 10) and (first.tokens == again.tokens).all() and first.targets.sum() == 18
    assert (first.tokens != other.tokens).any() and len(mine) == CONFIG.steps * (CONFIG.repeats + 1)


ROOT = Path(__file__).parents[2]
PEAK = """
import numpy as np
from experiments.bench_process import PeakMemory
before = np.ones(20_000_000, np.float32)
del before
peak = PeakMemory()
start = peak()
held = np.ones(10_000_000, np.float32)
during = peak() - start
del held
print(peak.status is not None, during, peak() - start)
"""


def test_peak_memory_is_that_of_after_it_was_made():
    """In a process of its own: what else this one holds comes and goes."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    forgets, during, after = done.stdout.split()
    if forgets == "False":
        pytest.skip("this system cannot forget a peak")
    assert 35_000_000 < int(during) < 70_000_000 and int(after) > 35_000_000


class Broken:
    """A side that cannot load."""

    def __init__(self, config):
        raise InputError("no such model")


class Dying:
    """A side whose process is killed, as for want of memory."""

    about = {}

    def __init__(self, config):
        pass

    def __call__(self):
        os._exit(9)


def test_a_side_that_fails_says_why():
    with pytest.raises(InputError, match="no such model"):
        Side(Broken, CONFIG)
    side = Side(Dying, CONFIG)
    with pytest.raises(InputError, match="ended with exit code 9.*smaller batch_size"):
        side()
    side.close()


def test_the_type_of_the_config_chooses_the_benchmark(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(bench, "bench_training", ran.append)
    monkeypatch.setattr(bench, "bench_decoding", ran.append)
    (tmp_path / "base.yaml").write_text("type: train\n")
    (tmp_path / "train.yaml").write_text("base: base.yaml\nrank: 4\n")
    for argv in (["--config", str(tmp_path / "train.yaml")], ["--repeats", "2"], ["--type=train"]):
        monkeypatch.setattr(sys, "argv", ["bench", *argv])
        bench.main()
    assert ran == [TrainBenchConfig(rank=4), BenchConfig(repeats=2), TrainBenchConfig()]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"length": 1}, {"rank": 0}])
def test_sizes_are_checked(wrong):
    with pytest.raises(ValueError, match="at least"):
        TrainBenchConfig(**wrong)
