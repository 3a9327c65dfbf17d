"""Generated functions do what their descriptions say; pairs from Python's library are whole."""

import ast
import itertools
import math
import random

import pytest

from finetune.code_pairs import code_pairs, meanings
from finetune.library_code import functions_of, library_pairs
from models.errors import InputError

NUMBERS = [[3, -4, 8, 9, 0, 12, -7, 5, 2], [6, 1, 10, -2, 7, 15, 4, 27], [42, 63, 72, 11, -9]]
WORDS = [["apple", "sea", "name", "item", "cat", "ibid", "territories"], ["tent", "banana", "dice", "Exam", "mat"]]


def test_every_function_does_what_it_is_said_to_do():
    """All of both sides, run: on lists, and on one that leaves nothing."""
    count = 0
    for meaning in itertools.chain(meanings(False), meanings(True)):
        space = {"math": math}
        exec(compile(meaning.code(), "solve", "exec"), space)
        for values in (*(NUMBERS if meaning.kind == "numbers" else WORDS), []):
            try:
                expected = meaning.apply(values)
            except ValueError:  # the largest of nothing
                with pytest.raises(ValueError):
                    space["solve"](values)
            else:
                found = space["solve"](values)
                assert (type(found), found) == (type(expected), expected), meaning.code()
        count += 1
    assert count > 8000


def test_a_wrong_function_would_be_seen():
    meaning = next(m for m in meanings(False) if m.kind == "numbers" and "> 0" in m.code() and "abs" not in m.code())
    space = {"math": math}
    exec(meaning.code().replace("> 0", "< 0"), space)
    differs = []
    for values in NUMBERS:
        try:
            differs.append(space["solve"](values) != meaning.apply(values))
        except ValueError:
            differs.append(True)
    assert any(differs)


def test_functions_are_told_apart_by_their_descriptions():
    """One meaning has one function and several descriptions; no description fits two functions."""
    rng = random.Random(0)
    of: dict[str, str] = {}
    for meaning in meanings(False):
        for _ in range(3):
            text, code = meaning.describe(rng), meaning.code()
            assert of.setdefault(text, code) == code
    assert len(of) > 1.5 * len(meanings(False))


def test_no_function_is_on_both_sides_and_all_come_once_before_any_comes_twice():
    once = len(meanings(False))
    train, test = code_pairs(once + 200, 0, False), code_pairs(500, 0, True)
    assert not {one.completion for one in train} & {one.completion for one in test}
    assert len({one.completion for one in train[:once]}) == len({one.completion for one in train}) == once
    assert train[:50] == code_pairs(50, 0, False) != code_pairs(50, 1, False)
    with pytest.raises(InputError, match="size must not be negative"):
        code_pairs(-1, 0, False)


def test_pairs_of_the_library_are_whole():
    train, test = library_pairs(False), library_pairs(True)
    assert len(train) > 500 and 0.05 < len(test) / len(train) < 0.3
    both = [*train, *test]
    assert len({one.prompt for one in both}) == len({one.completion for one in both}) == len(both)
    for one in both[::20]:
        (tree,) = ast.parse(one.completion).body
        assert isinstance(tree, ast.FunctionDef) and ast.get_docstring(tree) is None
        assert len(one.prompt) > 12 and one.prompt.count("\n") == 1


def test_a_docstring_is_taken_out_of_a_method():
    source = '''class A:
    @staticmethod
    def first(x):
        """Returns what comes
        first.

        And more.
        """
        y = x

        return y[0]

    def second(self):
        return 2

    def third(self):
        """Too short."""
        return 3
'''
    found = list(functions_of(source))
    assert found == [("Returns what comes first.", "def first(x):\n    y = x\n    return y[0]")]
    assert list(functions_of("def broken(:")) == []
