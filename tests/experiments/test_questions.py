"""Question files in Spec-Bench's format: tasks, spacing, bad lines."""

import json
from pathlib import Path

import pytest

from experiments.questions import TASKS, read_questions
from models.errors import InputError

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"


def write(path: Path, *records) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def question(number: int, category: str = "qa", turns=("why?",)) -> dict:
    return {"question_id": number, "category": category, "turns": list(turns)}


def test_our_own_questions_are_ten_per_task():
    questions = read_questions(PROMPTS / "spec_bench.jsonl")
    assert [sum(q.task == task for q in questions) for task in TASKS] == [10] * 6 + [0]
    assert all(len(q.turns) == (2 if q.task == "multi-turn" else 1) for q in questions)
    more = read_questions(PROMPTS / "code_and_math.jsonl")
    assert [sum(q.task == task for q in more) for task in ("math", "code")] == [10, 10] == [len(more) // 2] * 2
    assert not {q.turns[0] for q in questions} & {q.turns[0] for q in more}, "heads are trained on the former"


def test_tasks_and_spacing(tmp_path):
    path = write(tmp_path / "q.jsonl", *(question(i) for i in range(8)), question(8, "coding", ["a", "b"]), "")
    assert [q.task for q in read_questions(path)] == ["multi-turn"] + ["qa"] * 8
    assert [q.id for q in read_questions(path, 2)] == ["8", "0", "4"]


def test_bad_lines_are_named_and_the_others_kept(tmp_path, capsys):
    bad = ["{", "[1]", {"category": "qa", "turns": ["a"]}, question(3, turns=()), question(4, turns=[" "])]
    path = write(tmp_path / "q.jsonl", question(1), *bad, question(7))
    assert [q.id for q in read_questions(path)] == ["1", "7"]
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in errors] == ["2", "3", "4", "5", "6"]
    assert "it has no question_id" in errors[2] and "turns is not a list of texts" in errors[3]


def test_a_file_without_a_question(tmp_path):
    with pytest.raises(InputError, match="has no question"):
        read_questions(write(tmp_path / "q.jsonl", "{"))
    with pytest.raises(InputError, match="cannot read the questions file"):
        read_questions(tmp_path / "none.jsonl")
