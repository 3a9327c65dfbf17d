"""The check of exact methods on a tiny model: what it expects, what it finds, and that it sees a text that differs."""

import json

import pytest

from experiments import check_exact
from experiments.check_exact import Found, compare, expectations
from models import load_model
from tests.support.tiny_folder import write_tiny_folder


def flags(tmp_path) -> list[str]:
    model = write_tiny_folder(tmp_path / "tiny", max_length=1024)
    questions = tmp_path / "questions.jsonl"
    lines = [{"question_id": i, "category": "qa", "turns": ["ab" * (i + 2)]} for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "exact.yaml").write_text("methods: [{method: speculative_sampling, options: {length: 2}}]")
    found = ["--config", str(tmp_path / "exact.yaml"), "--model", str(model), "--questions", str(questions)]
    return [*found, "--out", str(tmp_path / "out"), "--prompts", "3", "--batch", "2", "--max_new_tokens", "8"]


def test_what_is_expected():
    texts = [[1, 2, 3, 4], [5, 6, 7, 8], [3, 3, 3, 3], [9, 8, 7, 6]]
    expected = expectations(texts, [8], 4)
    assert expected.stops == (3, 8) and expected.limits == [4, 4, 4, 2]
    assert expected.alone == [[1, 2, 3], [5, 6, 7, 8], [3], [9, 8]] and expected.together[3] == [9, 8]
    limited = expectations([[1, 2, 3, 4]] * 2, [], 6)
    assert limited.limits == [6, 2] and limited.together == [[1, 2, 3], [1, 2]]


def test_methods_are_compared_alone_and_together(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    argv = flags(tmp_path)
    check_exact.main(argv)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| speculative_sampling (length 2) | same 3 of 3 | same 3 of 3 |" in page
    wrong = {"greedy": (Found(3, 0, 3), Found(2, 1, 3)), "mine": (Found(3, 0, 3), Found(2, 0, 3))}
    monkeypatch.setattr(check_exact, "check", lambda *arguments: wrong)
    with pytest.raises(SystemExit, match="not exact: mine"):
        check_exact.main(argv)
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| greedy | same 3 of 3 | same 2 of 3, 1 differ at a tie |" in page


def test_only_what_differs_where_logits_are_close_is_a_tie(tmp_path, monkeypatch):
    model, params, _ = load_model(str(write_tiny_folder(tmp_path / "tiny")))
    asked = []

    def gap(model, params, tokens):
        asked.append(tokens)
        return 1e-4 if tokens[0] == 7 else 0.5

    monkeypatch.setattr(check_exact, "gap", gap)
    texts, wanted = [[1, 2], [1, 3], [1, 3], [1]], [[1, 2], [1, 2], [1, 2], [1, 2]]
    assert compare(model, params, [[7], [7], [8], [7]], texts, wanted) == Found(same=1, ties=1, total=4)
    assert asked == [[7, 1], [8, 1]], "a text that merely ends elsewhere is no tie"
