"""The benchmark of grammars on a tiny model: its last line, its page, its arithmetic."""

import json
import sys

import pytest

from experiments import bench
from experiments.bench_constrained import ConstrainedBenchConfig, GrammarSide, summarise
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

CONFIG = """
type: constrained
prompts: ["ab", "c"]
max_new_tokens: 6
repeats: 1
grammars:
  - {name: table, language: regex, source: "[ab]{40}"}
  - {name: engine, language: lark, source: 'start: "(" start ")" | "a"', most: 0.15}
"""


def test_last_line_and_page(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    folder = write_tiny_folder(tmp_path / "model")
    (tmp_path / "bench.yaml").write_text(CONFIG)
    flags = ["--config", str(tmp_path / "bench.yaml"), "--model", str(folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    bench.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["none"]["over"] == 0 and min(figures[name]["seconds"] for name in ("none", "table", "engine")) > 0
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| table |" in page and "at most 15%" in page and page.count("\n| ") == 5


def test_medians_are_compared_and_names_told_apart():
    config = ConstrainedBenchConfig(grammars=(GrammarSide(),))
    found = summarise(config, {"none": [2.0, 1.0, 9.0], "table": [3.0, 2.5, 2.0]})
    assert found["none"] == {"seconds": 2.0, "over": 0.0} and found["table"] == {"seconds": 2.5, "over": 0.25}
    with pytest.raises(InputError, match="names of their own"):
        summarise(ConstrainedBenchConfig(grammars=(GrammarSide(), GrammarSide())), {"none": [1.0], "table": [1.0]})
    with pytest.raises(ValueError, match="language must be one of regex, lark, json_schema, got 'ebnf'"):
        GrammarSide(language="ebnf")
