"""Passages that stand more than once: found beside a slow search, first occurrences stay, others are cut."""

import random

import pytest

from finetune.cleaning.repeats import RepeatsConfig, cut_spans, repeated_spans, repeats_stage, word_hashes
from models.errors import InputError


def run(texts, words=5, min_words=0):
    stage = repeats_stage(RepeatsConfig(words, min_words))
    verdicts = stage.apply(texts, stage.decide([stage.summarize(texts)])[0])
    return [verdict.text for verdict in verdicts]


def slow(texts, length):
    """The words that windows cover which stood before, by comparing all of them."""
    windows = [
        (t, i, tuple(words[i : i + length])) for t, words in enumerate(texts) for i in range(len(words) - length + 1)
    ]
    cut = set()
    for place, (t, i, window) in enumerate(windows):
        first = next(other for other in windows if other[2] == window)
        if windows.index(first) < place and (first[0] != t or i - first[1] >= length):
            cut |= {(t, i + j) for j in range(length)}
    return cut


@pytest.mark.parametrize("length", [2, 3, 5, 6, 7])
def test_spans_are_those_of_a_slow_search(length):
    rng = random.Random(length)
    texts = [[rng.choice("ab") for _ in range(size)] for size in (0, 12, 1, 20, 4)]
    spans = repeated_spans(word_hashes([" ".join(words) for words in texts]), length)
    assert {(t, i) for t, found in enumerate(spans) for a, b in found for i in range(a, b)} == slow(texts, length)


def test_planted_passages_are_cut_where_they_stand_again():
    passage = "one two three four five six"
    texts = [f"a b {passage} c", f"d  {passage}\n\ne f", "one two three four g", f"{passage} h {passage}"]
    assert run(texts) == [texts[0], "d  e f", texts[2], "h"]
    assert run(texts, words=7) == texts, "shorter than what counts"


def test_nothing_is_lost_and_nothing_is_left_to_cut():
    rng = random.Random(0)
    parts = [" ".join(rng.choices("abcdefghij", k=9)) for _ in range(6)]
    texts = [" ".join(rng.sample(parts, 3)) for _ in range(8)]
    left = run(texts, words=9)
    assert sum(part in " ".join(left) for part in parts) == len([p for p in parts if any(p in text for text in texts)])
    windows = lambda some: [tuple(w[i : i + 9]) for w in map(str.split, some) for i in range(len(w) - 8)]  # noqa: E731
    assert len(windows(left)) < len(windows(texts))


def test_a_word_that_goes_on_and_on_leaves_a_window():
    assert run(["a " * 40], words=5) == ["a a a a a"]


def test_texts_that_are_nearly_all_repeats_are_dropped():
    assert run(["a b c d e f g h", "x a b c d e f g h"], min_words=2) == ["a b c d e f g h", None]
    assert run(["a b", "a b"], min_words=3) == ["a b", "a b"], "short, but nothing was cut"


def test_cutting():
    text = " one  two\nthree four "
    assert cut_spans(text, []) == text
    assert cut_spans(text, [(1, 2)]) == "one  three four"
    assert cut_spans(text, [(0, 1), (3, 4)]) == "two\nthree"


def test_no_texts():
    assert run([]) == [] and run([""]) == [""]


@pytest.mark.parametrize("settings", [{"words": 1}, {"min_words": -1}])
def test_settings_that_do_not_fit(settings):
    with pytest.raises(InputError):
        RepeatsConfig(**settings)
