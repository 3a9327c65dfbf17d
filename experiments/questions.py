"""Question files in Spec-Bench's format (2401.07851): JSON Lines with question_id, category and turns."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from models.errors import InputError

_TASKS = {
    "translation": "translation",
    "summarization": "summarization",
    "qa": "qa",
    "math_reasoning": "math",
    "rag": "rag",
    "code": "code",
}  # every other category is one of the multi-turn questions; Spec-Bench has no code
TASKS = ("multi-turn", *_TASKS.values())


@dataclasses.dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        id: its name.
        task: one of `TASKS`, or one of `experiments.generated`.
        turns: the user's turns.
        document: what the first turn is about, to be put before it; may be empty.
        answer: what the last reply must say; None where replies are not scored.
    """

    id: str
    task: str
    turns: tuple[str, ...]
    document: str = ""
    answer: str | None = None


def read_questions(path: Path, per_task: int | None = None) -> list[Question]:
    """Returns the questions, in the order of `TASKS`; bad lines are named on stderr and left out.

    Args:
        path: the file, or the name of a dataset on the hub, owner/name, whose first split is read.
        per_task: how many of each task; evenly spaced over the file's, so that a few stand for all. None: all.

    Raises:
        InputError: no such file, or no good line in it.
    """
    questions = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            questions.append(_read(line))
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path}:{number}: left out, {error}; the line is {line:.80}", file=sys.stderr)
    if not questions:
        raise InputError(f"{path} has no question: wanted lines with question_id, category and turns (Spec-Bench)")
    return [question for task in TASKS for question in _spaced([q for q in questions if q.task == task], per_task)]


def _lines(path: Path) -> list[str]:
    if not path.exists() and len(path.parts) == 2 and not path.suffix:
        import datasets

        try:
            splits = datasets.load_dataset(str(path), streaming=True)
            return [json.dumps(row) for row in next(iter(splits.values()))]
        except Exception as error:  # of the hub, the network, the disk and each reader
            raise InputError(f"there is no file {path}, and the hub gives no such dataset: {error}") from error
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the questions file {path}: {error}") from error


def _read(line: str) -> Question:
    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError("not an object")
    for key in ("question_id", "category", "turns"):
        if key not in data:
            raise ValueError(f"it has no {key}")
    turns = data["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("turns is not a list of texts")
    return Question(str(data["question_id"]), _TASKS.get(data["category"], "multi-turn"), tuple(turns))


def _spaced(questions: Sequence[Question], count: int | None) -> Sequence[Question]:
    if count is None or count >= len(questions):
        return questions
    return [questions[index * len(questions) // count] for index in range(count)]
