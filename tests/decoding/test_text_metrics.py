"""Figures of texts by planted values, by their definitions, and by what NLTK says of the same texts."""

import math

import numpy as np
import pytest

from decoding.text_metrics import (
    distinct_n,
    diversity,
    longest_overlaps,
    rep_n,
    self_bleu,
    text_figures,
    type_token_ratio,
)

LOOP, VARIED = [1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]


def test_type_token_ratio_is_a_mean_over_texts():
    assert type_token_ratio([LOOP]) == 2 / 8
    assert type_token_ratio([LOOP, VARIED, [5, 5]]) == pytest.approx((0.25 + 1.0 + 0.5) / 3)
    assert type_token_ratio([LOOP, []]) == 0.25


def test_distinct_n_counts_over_all_texts_together():
    assert distinct_n([VARIED], 1) == 1.0
    assert distinct_n([VARIED, VARIED], 1) == 0.5
    assert distinct_n([LOOP, VARIED], 2) == len({(1, 2), (2, 1), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8)}) / 16


def test_rep_n_counts_inside_each_text_and_adds_up_before_it_divides():
    assert rep_n([LOOP], 2) == pytest.approx(1 - 2 / 7)
    assert rep_n([VARIED, VARIED], 2) == 0.0
    assert rep_n([LOOP, [3, 3, 3]], 2) == pytest.approx(1 - (2 + 1) / (7 + 2))
    assert rep_n([LOOP, [3]], 4) == pytest.approx(1 - 2 / 5)


def test_diversity_is_the_product_over_2_3_and_4():
    assert diversity([VARIED]) == 1.0
    assert diversity([LOOP]) == pytest.approx(2 / 7 * 2 / 6 * 2 / 5)


def test_self_bleu_is_what_nltk_says():
    """NLTK's sentence_bleu with smoothing method 1, each text against the others (repeats, ties and short texts)."""
    texts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8, 9], [2, 3, 4, 5, 1, 1, 1, 1], [9, 8], [5]]
    assert self_bleu(texts) == pytest.approx(0.34139671392963816, abs=1e-9)
    assert self_bleu(texts, n=2) == pytest.approx(0.4591827468535478, abs=1e-9)
    assert self_bleu(texts[:2]) == pytest.approx(0.4206293510159229, abs=1e-9)


def test_self_bleu_at_its_ends():
    assert self_bleu([VARIED, VARIED]) == pytest.approx(1.0)
    assert self_bleu([[1, 2, 3, 4], [5, 6, 7, 8]]) == 0.0
    assert self_bleu([VARIED, VARIED, []]) == pytest.approx(1.0)


def contains(text: list[int], run: list[int]) -> bool:
    return any(text[start : start + len(run)] == run for start in range(len(text) - len(run) + 1))


def test_longest_overlaps_equal_a_search_of_every_run():
    rng = np.random.default_rng(0)
    corpus = [rng.integers(0, 4, length).tolist() for length in (30, 0, 12, 1)]
    texts = [rng.integers(0, 4, length).tolist() for length in (20, 7, 1, 0)] + [corpus[0][5:25], [9, 9]]
    expected = []
    for text in texts:
        runs = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
        expected.append(max((len(run) for run in runs if any(contains(c, run) for c in corpus)), default=0))
    assert longest_overlaps(texts, corpus) == expected
    assert expected[4] == 20 and expected[5] == 0


def test_a_run_across_two_texts_of_the_corpus_is_no_overlap():
    assert longest_overlaps([[1, 2, 3, 4]], [[1, 2], [3, 4]]) == [2]
    assert longest_overlaps([[1, 2], [3, 4]], [[1, 2, 3, 4]]) == [2, 2]
    assert longest_overlaps([[1]], []) == [0]


def test_all_figures_by_name_of_lists_and_arrays():
    lists = [LOOP, VARIED]
    figures = text_figures(lists, [[3, 4, 5]])
    arrays = text_figures(np.array(lists, np.int32), np.array([[3, 4, 5]], np.int32))
    assert figures == arrays
    assert figures["tokens"] == 8 and figures["type_token_ratio"] == type_token_ratio(lists)
    assert figures["distinct_2"] == distinct_n(lists, 2) and figures["rep_4"] == rep_n(lists, 4)
    assert figures["overlap_mean"] == 1.5 and figures["overlap_max"] == 3
    assert "overlap_mean" not in text_figures(lists)


def test_nothing_to_count_is_nan():
    figures = text_figures([[], []], [[1]])
    assert figures["tokens"] == 0 and figures["overlap_max"] == 0
    assert math.isnan(figures["type_token_ratio"]) and math.isnan(figures["rep_2"]) and math.isnan(self_bleu([[1]]))
