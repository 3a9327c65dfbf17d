import json
import sys

import pytest

from experiments import bench, bench_decoding
from experiments.runtime import run_main
from experiments.timed import alternate
from tests.support.tiny_folder import write_tiny_folder


def test_last_line_is_json_with_the_promised_keys(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr(bench_decoding, "Transformers", _absent)
    model = write_tiny_folder(tmp_path / "tiny")
    flags = ["--max_new_tokens", "4", "--repeats", "2", "--bandwidth_bytes", "4000000", "--prompts", "a", "bc"]
    flags += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["bench", "--model", str(model), *flags])
    run_main(bench.main)
    out = capsys.readouterr().out.splitlines()
    result = json.loads(out[-1])
    assert result["speedup_vs_transformers"] is None and "parity" in out[0]
    assert result["tokens_per_second"] > 0 and result["bandwidth_share"] > 0
    assert (result["repeats"], result["new_tokens_per_repeat"]) == (2, 8)


def _absent(*args):
    raise ImportError("No module named 'torch'")


def test_summary_is_the_ratio_of_medians_over_equal_token_counts():
    config = bench_decoding.BenchConfig(prompts=("a", "b"), max_new_tokens=10, repeats=3)
    ours = [bench_decoding.Timing(0.1, d) for d in (1.0, 9.0, 1.0)]
    theirs = [bench_decoding.Timing(0.2, d) for d in (2.0, 2.0, 0.1)]
    result = bench_decoding.summarise(
        config, bytes_per_step=500, bandwidths=[1.0, 20_000.0, 9e9], ours=ours, theirs=theirs
    )
    assert result["speedup_vs_transformers"] == pytest.approx(2.2 / 1.1)
    assert result["tokens_per_second"] == pytest.approx(20 / 1.1)
    assert result["bandwidth_share"] == pytest.approx(500 / (1.0 / 20) / 20_000.0)


def test_sides_alternate_after_one_uncounted_round():
    order = []

    def side(name):
        def run():
            order.append(name)
            return len(order)

        return run

    results = alternate([side("a"), side("b")], repeats=2)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert results == [[3, 5], [4, 6]]
