"""Texts that a model wrote: loops, files that are gone on with, files that are refused."""

import io
import json

import pytest

from finetune.adapters.saved import Base
from finetune.self_texts import (
    SHORTEST,
    Plan,
    append,
    as_rows,
    before_loop,
    filtered,
    fingerprint,
    read_texts,
    texts_file,
)
from models.errors import InputError

BASE, OTHER = Base("tiny", "a" * 64), Base("other", "b" * 64)
VARIED = list(range(100, 160))


def test_a_text_is_cut_where_eight_tokens_come_for_the_third_time():
    loop = list(range(10))
    assert before_loop(VARIED) == 60
    assert before_loop(VARIED + loop * 2) == 80, "twice is no circle"
    assert before_loop(VARIED + loop * 3) == 80
    assert before_loop([7] * 9) == 9 and before_loop([7] * 10) == 2
    assert before_loop([1, 2, 3]) == 3


def test_texts_that_run_in_circles_are_cut_or_dropped():
    whole = filtered(0, "train", [1], VARIED)
    assert (whole.tokens, whole.loops) == (VARIED, False)
    cut = filtered(1, "test", [1], VARIED + [5] * 20)
    assert cut.loops and cut.tokens == VARIED + [5, 5]
    dropped = filtered(2, "test", [1], VARIED[: SHORTEST - 3] + [5] * 20)
    assert dropped.loops and not dropped.tokens
    assert filtered(3, "test", [1], [4]).tokens == [4], "short, but no circle"


def some(first: int, last: int) -> list:
    return [
        filtered(index, ("train", "calibration", "test")[index % 3], [1, 2], VARIED[index:])
        for index in range(first, last)
    ]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "texts.jsonl"


def test_a_file_is_gone_on_with(path):
    plan = Plan(BASE, 5, {"seed": 0})
    with texts_file(path, plan) as (there, file):
        assert there == set()
        append(file, some(0, 3))
    path.write_text(path.read_text()[:-9])  # killed while it wrote
    with pytest.raises(InputError, match="is cut short: it has 2 of 5 texts; run the same"):
        read_texts(path, BASE)
    with texts_file(path, plan) as (there, file):
        assert there == {0, 1}
        append(file, some(2, 5)[::-1])
    assert read_texts(path, BASE) == some(0, 5)
    rows = as_rows(some(0, 2))
    assert rows.tokens[:4].tolist() == [1, 2, 100, 101] and rows.targets[:4].tolist() == [False, False, True, True]
    assert rows.starts.tolist() == [0, 62, 123]
    assert fingerprint(some(0, 5)) == fingerprint(read_texts(path, BASE)) != fingerprint(some(0, 4))


def test_dropped_texts_are_counted_but_not_read(path):
    with texts_file(path, Plan(BASE, 2, {})) as (_, file):
        append(file, [filtered(0, "train", [1], [5] * 30), *some(1, 2)])
    assert read_texts(path, BASE) == some(1, 2)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(OTHER, 5, {"seed": 0}), "another base"),
        (Plan(BASE, 6, {"seed": 0}), "another wanted: 5, now 6"),
        (Plan(BASE, 5, {"seed": 1}), "another settings"),
    ],
)
def test_a_file_of_something_else_is_not_gone_on_with(path, plan, words):
    with texts_file(path, Plan(BASE, 5, {"seed": 0})):
        pass
    before = path.read_text()
    with pytest.raises(InputError, match=f"was begun with {words}"), texts_file(path, plan):
        pass
    assert path.read_text() == before


def test_foreign_files_are_refused(path):
    with pytest.raises(InputError, match="cannot read the texts .* python -m experiments.generate writes such files"):
        read_texts(path, BASE)
    with texts_file(path, Plan(BASE, 1, {})) as (_, file):
        append(file, some(0, 1))
    with pytest.raises(InputError, match="were written by 'tiny' .*, not by 'other'"):
        read_texts(path, OTHER)
    good = path.read_text()
    for bad, words in (
        ("hello\n", "holds no texts of python -m experiments.generate"),
        (json.dumps({"format": 2}) + "\n", "holds no texts"),
        (good + '{"index": 1}\n', ":3 is no text"),
        (good.replace('"train"', '"dev"'), "no such split: dev"),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=words):
            read_texts(path, BASE)


def test_appending_writes_whole_lines():
    file = io.StringIO()
    append(file, some(0, 2))
    assert [json.loads(line)["index"] for line in file.getvalue().splitlines()] == [0, 1]
