"""Needle documents, read by a few regular expressions: the answer follows from the text, and from one place alone."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.needles import key_value_document, needle_document
from models.errors import InputError

ROOT = Path(__file__).parents[2]
SIZES = (60, 500, 6000, 30_000)


def answer_of(document: str, question: str) -> str:
    """Returns what a reader of the document answers; fails where a fact is stated twice."""
    codes = re.findall(r"The code of room (\d+) is (\d+)\.", document)
    keys = re.findall(r"The key of (\w+ \w+) opens room (\d+)\.", document)
    assert len(dict(codes)) == len(codes) and len(dict(keys)) == len(keys)
    assert len(set(dict(codes).values())) == len(codes) and len(set(dict(keys).values())) == len(keys)
    one = re.fullmatch(r"What is the code of room (\d+)\?", question)
    two = re.fullmatch(r"What is the code of the room that the key of (\w+ \w+) opens\?", question)
    return dict(codes)[one[1] if one else dict(keys)[two[1]]]


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("words", SIZES)
def test_the_answer_follows_and_stands_in_one_place(words, hops):
    for seed in range(10):
        document, question, answer = needle_document(random.Random(seed), words, hops)
        assert re.fullmatch(r"\d{4}", answer) and answer_of(document, question) == answer
        assert document.count(answer) == 1 and answer not in question
        assert words <= len(document.split()) < words + 20
        facts = re.findall(r"The (?:code|key) of .*?\.", document)
        assert (len(facts) > 2 or words < 100) and len(facts) <= 800
        rest = re.sub(r"The (?:code|key) of .*?\.", "", document)
        assert not re.search(r"\d", rest) and len(rest.split()) > words / 2


def test_only_a_one_hop_question_names_the_room():
    document, question, answer = needle_document(random.Random(0), 500, 2)
    (room,) = re.findall(rf"room (\d+) is {answer}", document)
    assert not re.search(r"\d", question) and document.count(f"room {room}") == 2
    document, question, answer = needle_document(random.Random(0), 500, 1)
    (room,) = re.findall(rf"room (\d+) is {answer}", document)
    assert room in question and "key" not in document


def test_needles_are_anywhere():
    places = []
    for seed in range(60):
        document, _, answer = needle_document(random.Random(seed), 1000, 1)
        places.append(document.index(answer) / len(document))
    assert min(places) < 0.1 and max(places) > 0.9 and 0.35 < sum(places) / len(places) < 0.65


def test_the_random_state_says_it_all():
    first = needle_document(random.Random(7), 300, 2)
    assert first == needle_document(random.Random(7), 300, 2) != needle_document(random.Random(8), 300, 2)
    rng = random.Random(7)
    assert needle_document(rng, 300, 2) == first != needle_document(rng, 300, 2)
    code = "import random; from experiments.needles import needle_document as n; print(n(random.Random(7), 300, 2))"
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert elsewhere.stdout.strip() == str(first), "another process, another hash seed"


@pytest.mark.parametrize(
    ("words", "hops", "message"), [(59, 1, "at least 60"), (500, 3, "must be 1 or 2"), (500, 0, "1 or 2")]
)
def test_what_cannot_be(words, hops, message):
    with pytest.raises(InputError, match=message):
        needle_document(random.Random(0), words, hops)


@pytest.mark.parametrize("words", (2, 80, 4000))
def test_a_key_has_one_value(words):
    for seed in range(10):
        document, question, answer = key_value_document(random.Random(seed), words)
        pairs = json.loads(document, object_pairs_hook=lambda pairs: pairs)
        assert len(pairs) == len(dict(pairs)) == len({value for _, value in pairs}) == words // 2
        (key,) = re.findall(r'"(\d+)"', question)
        assert dict(pairs)[key] == answer and re.fullmatch(r"\d{5}", answer) and document.count(answer) == 1
    first = key_value_document(random.Random(7), words)
    assert first == key_value_document(random.Random(7), words) != key_value_document(random.Random(8), words)


def test_keys_that_are_asked_for_are_anywhere():
    places = []
    for seed in range(60):
        document, _, answer = key_value_document(random.Random(seed), 200)
        places.append(document.index(answer) / len(document))
    assert min(places) < 0.1 and max(places) > 0.9 and 0.35 < sum(places) / len(places) < 0.65


@pytest.mark.parametrize("words", (1, 8001))
def test_objects_that_cannot_be(words):
    with pytest.raises(InputError, match="2 to 8000"):
        key_value_document(random.Random(0), words)
