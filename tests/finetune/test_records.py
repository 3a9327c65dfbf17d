"""Questions on records: one right answer each, which stands in the text; those for testing are drawn apart."""

import random

import pytest

from finetune.data import read_data
from finetune.data_configs import RecordsData
from finetune.records import ANSWER, TASKS, record_example, record_examples
from finetune.rows import Pairs
from finetune.stories import story_tokenizer, vocabulary
from models.errors import InputError


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_of_the_records(seed):
    for task in TASKS:
        example = record_example(random.Random(seed), 8, task)
        *records, question = example.prompt.split(" . ")
        records, question = [record.split() for record in records], question.split()
        assert len(records) == 8 and len({record[0] for record in records}) == 8
        answer = example.completion.split()
        assert len(answer) == ANSWER and example.completion.startswith(" ")
        if task == "find":
            assert [[*question, *answer]] == [record for record in records if record[0] == question[0]]
        else:
            there = [record[0] for record in records if record[-1] == question[-1]]
            assert there and answer == (there + ["."] * ANSWER)[:ANSWER]
        assert set(example.prompt.split()) | set(answer) <= set(vocabulary())


def test_tasks_take_turns_and_tests_are_others():
    train, test = (record_examples(20, 4, TASKS, 0, test) for test in (False, True))
    assert [example.task for example in train[:4]] == ["find", "gather"] * 2
    assert train[:5] == record_examples(5, 4, TASKS, 0, False) and not set(train) & set(test)


def test_they_are_read_as_pairs():
    data = read_data(RecordsData(size=6, test_size=4, records=5), story_tokenizer(), 8, Pairs(0, 48))
    assert (data.train.lengths == 1 + ANSWER).all() and (data.train.source_lengths > 40).all()
    assert len(data.questions) == 4 and data.notes == ()


def test_what_cannot_be_asked():
    with pytest.raises(InputError, match="records must be 1 to 24"):
        record_example(random.Random(0), 25, "find")
    with pytest.raises(InputError, match=r"unknown task of records 'fin'\. Did you mean 'find'"):
        record_example(random.Random(0), 3, "fin")
    with pytest.raises(InputError, match="no task"):
        record_examples(1, 3, (), 0, False)
    with pytest.raises(InputError, match="size and records must be at least 1"):
        RecordsData(records=0)
