"""Questions written by code: the same ones for the same seed, answers that are right, and how replies are scored."""

import re

import numpy as np
import pytest

from experiments.generated import GENERATED, generate, is_correct
from models.errors import InputError


def texts_of(question) -> tuple:
    return question.document, question.turns


def test_questions_come_from_the_seed_alone():
    few, many = generate(tuple(GENERATED), 3, seed=1), generate(tuple(GENERATED), 5, seed=1)
    assert [q for q in many if int(q.id.rsplit("-", 1)[1]) < 3] == few
    assert len({texts_of(q) for q in many}) == len(many) and len({q.id for q in many}) == len(many)
    assert not {texts_of(q) for q in generate(tuple(GENERATED), 3, seed=2)} & {texts_of(q) for q in few}
    assert {q.task for q in few} == set(GENERATED)


def test_arithmetic_answers_are_right():
    for question in generate(("arithmetic",), 50):
        start, more, boxes, size, away = map(int, re.findall(r"\d+", question.turns[0]))
        assert int(question.answer) == start + more + boxes * size - away > 0


def test_list_answers_are_what_python_gives():
    for question in generate(("lists",), 50):
        numbers, code = re.search(r"a = (\[.*?\])\. What is the value of `(.*?)`", question.turns[0]).groups()
        assert question.answer == str(eval(code, {"a": eval(numbers)}))


def test_word_answers_are_right():
    for question in generate(("words",), 50):
        text = question.turns[0].split(" End your reply")[0]
        if "backwards" in text:
            assert question.answer[::-1] in text
            continue
        words = re.search(r": ((?:\w+, )+\w+)", text).group(1).split(", ")
        found = {"first": min(words), "last": max(words)}
        after = re.search(r"after (\w+)", text)
        assert question.answer == (words[words.index(after[1]) + 1] if after else found[text.split()[5]])


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("So 4 + 8 = 12.\nAnswer: 12", True),
        ("Answer: **12**.", True),
        ("answer: 12 pencils", True),
        ("Answer: 12\nNo. Answer: 13", False),
        ("The sum is 12", True),
        ("It is 12.\nThat was easy", False),
        ("Answer: 112", False),
        ("Answer: 12.5", False),
        ("Answer: -12", False),
        ("", False),
    ],
)
def test_replies_are_scored_exactly(reply, right):
    assert is_correct(reply, "12") == right


def test_documents_are_as_long_as_asked_for_and_hold_the_answer():
    for question in generate(("needle", "two_needles"), 3, document_words=120):
        assert 120 <= len(question.document.split()) < 140
        assert question.document.count(question.answer) == 1 and question.answer not in question.turns[0]


def test_a_lone_needle_is_the_only_fact():
    for question in generate(("lone_needle",), 5, document_words=600):
        (fact,) = re.findall(r"[^.]*\d[^.]*\.", question.document)
        assert question.answer in fact and question.turns[0].split("?")[0].split()[-1] in fact


def test_tasks_with_a_size_have_documents_of_that_size():
    texts = {task: generate((task,), 1, document_words=90)[0].document for task in GENERATED}
    for task in ("lone_needle", "key_value"):
        words = [len(texts[name].split()) for name in (task, *(f"{task}_{size}k" for size in (2, 4, 8, 16)))]
        assert words[0] < 120 and words[1] > 200
        np.testing.assert_allclose(np.divide(words[2:], words[1]), [2, 4, 8], rtol=0.02)
    question = generate(("key_value_4k",), 1)[0]
    assert question.task == "key_value_4k" and question.id == "key_value_4k-0-0"
    assert is_correct(f'The value is "{question.answer}".', question.answer)


def test_unknown_tasks_are_named():
    with pytest.raises(InputError, match="arithmetic"):
        generate(("arithmetics",), 1)
