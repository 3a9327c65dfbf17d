"""Generated tasks: the same for the same seed, right answers, no question on both sides, and how replies are scored."""

import inspect
import random
import re

import pytest

from finetune import corpus
from finetune.corpus import TASKS, Example, exact_match, generate
from models.errors import InputError


def examples(task, size=100, test=False):
    """(words of the question, answer) of examples of a task."""
    found = generate((task,), size, 3, test)
    assert all(example.prompt.startswith(f"{task} ") and example.prompt.endswith("\n") for example in found)
    return [(example.prompt.split()[1:], example.completion) for example in found]


def test_examples_come_from_the_seed_alone():
    few, many = generate(tuple(TASKS), 30, 1, False), generate(tuple(TASKS), 80, 1, False)
    assert many[:30] == few
    assert {example.task for example in few} == set(TASKS)
    assert not set(generate(("add", "sort"), 50, 2, False)) & set(generate(("add", "sort"), 50, 1, False))


def test_every_task_is_in_the_registry_under_its_name():
    own = {
        name: function
        for name, function in inspect.getmembers(corpus, inspect.isfunction)
        if list(inspect.signature(function).parameters) == ["rng"]
    }
    assert own == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_for_training_and_for_testing(task):
    train = {example.prompt for seed in range(3) for example in generate((task,), 1500, seed, False)}
    test = {example.prompt for seed in range(3) for example in generate((task,), 300, seed, True)}
    assert not train & test
    assert len(train) > 1500 and len(test) > 200  # the questions do not run out


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_short_and_have_an_answer(task):
    for example in generate((task,), 300, 0, False):
        assert len((example.prompt + example.completion).encode()) <= 48
        assert example.completion == example.completion.strip() != ""


def number(text):
    """The number that is written with its lowest digit first."""
    return int(text[0] + text[:0:-1]) if text.startswith("-") else int(text[::-1])


RIGHT = {
    "reverse": lambda words, answer: list(answer) == list(reversed(words[0])),
    "sort": lambda words, answer: sorted(words[0]) == list(answer),
    "shift": lambda words, answer: (
        [(ord(b) - ord(a)) % 26 for a, b in zip(words[1], answer, strict=True)] == [int(words[0])] * len(answer)
    ),
    "rotate": lambda words, answer: answer[-int(words[0]) :] + answer[: -int(words[0])] == words[1],
    "interleave": lambda words, answer: [answer[::2], answer[1::2]] == words,
    "double": lambda words, answer: answer[::2] == answer[1::2] == words[0],
    "ends": lambda words, answer: answer == re.sub(r"(\w)\w*?(\w)\b", r"\1\2", " ".join(words)),
    "count": lambda words, answer: len(words[1].split(words[0])) - 1 == int(answer),
    "lookup": lambda words, answer: words[:-1].count(words[-1] + answer) == 1,
    "add": lambda words, answer: number(words[0]) + number(words[1]) == number(answer),
    "subtract": lambda words, answer: number(words[0]) - number(words[1]) == number(answer),
    "digits": lambda words, answer: (sum(int(digit) for digit in words[0]) - int(answer)) % 10 == 0,
    "larger": lambda words, answer: sorted(words)[1] == answer,
}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task):
    for words, answer in examples(task):
        assert RIGHT[task](words, answer), (words, answer)


def test_numbers_are_written_from_their_lowest_digit():
    draws = iter((123, 45, 45, 123))

    class Fixed(random.Random):
        def randrange(self, *args):
            return next(draws)

    rng = Fixed()
    assert corpus.add(rng) == ("321 54", "861")
    assert corpus.subtract(rng) == ("54 321", "-87")


def test_exact_match_is_by_task_and_forgives_outer_spaces_alone():
    wanted = [Example("a", "12", "add"), Example("b", "7", "add"), Example("c", "tac", "reverse"), Example("d", "x")]
    assert exact_match([" 12\n", "7.", "tac", "X"], wanted) == {"all": 0.5, "add": 0.5, "reverse": 1.0}
    with pytest.raises(ValueError, match="zip"):
        exact_match(["12"], wanted)


@pytest.mark.parametrize(("tasks", "message"), [(("revers",), "'reverse'"), ((), "no task")])
def test_unknown_tasks_are_named(tasks, message):
    with pytest.raises(InputError, match=message):
        generate(tasks, 1, 0, False)
