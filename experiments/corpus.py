"""What a table-driven drafter can know before the first question: the target's own replies to questions that no cell
asks.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.loading import Loader
from experiments.questions import Question, read_questions
from models.errors import InputError

_BATCH = 8


def spare_questions(path: Path, asked: Collection[str], count: int) -> list[Question]:
    """Returns questions of the file whose ids are not among those asked, of every task alike: `count` at most.

    Raises:
        InputError: every question is asked.
    """
    spare = [question for question in read_questions(path) if question.id not in asked]
    if not spare:
        raise InputError(f"a row starts from a corpus, but every question of {path} is asked: lower per_task")
    tasks = [[q for q in spare if q.task == task] for task in dict.fromkeys(question.task for question in spare)]
    turns = [
        question for place in range(max(map(len, tasks))) for task in tasks for question in task[place : place + 1]
    ]
    return turns[:count]


def stamp(questions: Sequence[Question]) -> str:
    """Returns a fingerprint of a corpus's questions."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(q) for q in questions]).encode()).hexdigest()


def learnt_table(loader: Loader, name: str, questions: Sequence[Question], max_new_tokens: int, slots: int) -> Any:
    """Returns the table of tri-grams of the model's greedy replies to the questions' first turns.

    Args:
        loader: loads the model.
        name: the model.
        questions: what is asked.
        max_new_tokens: tokens per reply.
        slots: the table's.
    """
    from decoding.speculative.trigrams import count_trigrams

    fn, params, tokenizer = loader.decode_fn(name, "greedy", {}, draft=None, head=None, max_new_tokens=max_new_tokens)
    prompts = sorted((tokenizer.encode_chat(question.turns[0]) for question in questions), key=len)
    texts = []
    for first in range(0, len(prompts), _BATCH):
        output = fn(params, prompts[first : first + _BATCH])
        rows = [row[:length].tolist() for row, length in zip(output.tokens, output.lengths, strict=True)]
        texts += [[token for token in row if token not in tokenizer.stop_ids] for row in rows]
    print(f"{sum(map(len, texts))} tokens in {len(texts)} replies for a drafter to start from", flush=True)
    return count_trigrams(texts, fn.plan.model.config.vocab_size, slots)
