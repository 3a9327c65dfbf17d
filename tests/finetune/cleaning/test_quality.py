"""The scorer: gradients that are right, advertisements below passages, as many dropped as asked."""

import random

import numpy as np
import pytest

from finetune.cleaning.planted import FAULTS, passages
from finetune.cleaning.quality import QualityConfig, features, fit, quality_stage, scores
from models.errors import InputError


@pytest.fixture(scope="module")
def texts():
    """(reference, good texts, advertisements)."""
    rng, found = random.Random(0), passages()
    return found[:60], found[60:100], [FAULTS["advertisement"](rng, text) for text in found[100:108]]


def test_bad_texts_have_the_lowest_scores(texts):
    reference, good, bad = texts
    stage = quality_stage(QualityConfig(drop=1 / 6), reference)
    decided = stage.decide([stage.summarize(bad[:4]), stage.summarize(good), stage.summarize(bad[4:])])
    assert [len(part) for part in decided] == [4, 40, 4]
    verdicts = stage.apply(bad[:4], decided[0])
    assert all(verdict == (None, "low score") for verdict in verdicts) and not any(decided[2])
    assert sum(decided[1]) == 40


def test_the_fit_is_the_least_loss(texts):
    good, other = features(texts[0][:20]), features(texts[2])
    w = fit(good, other, 1e-2)

    def loss(w):
        margins = [(good @ w[:-1] + w[-1]), -(other @ w[:-1] + w[-1])]
        return sum(np.mean(np.logaddexp(0, -m)) / 2 for m in margins) + 0.005 * w[:-1] @ w[:-1]

    rng = np.random.default_rng(0)
    assert all(loss(w) < loss(w + 0.1 * rng.standard_normal(w.shape)) for _ in range(5))
    assert loss(w) < loss(1.1 * w) and loss(w) < loss(0.9 * w)
    assert scores(good, w).min() > scores(other, w).max()


def test_features_have_length_one():
    x = features(["The cat sat. The cat!", "", "one"])
    np.testing.assert_allclose(np.asarray(x.multiply(x).sum(axis=1)).ravel(), [1, 0, 1])
    assert x[0].nnz == 6 and features(["the CAT sat the cat"])[0].nnz == x[0].nnz


def test_what_does_not_fit():
    with pytest.raises(InputError, match="no texts"):
        quality_stage(QualityConfig(), [])
    with pytest.raises(InputError, match="drop must be"):
        QualityConfig(drop=1.0)
    stage = quality_stage(QualityConfig(), ["a good text"])
    assert stage.decide([stage.summarize([])]) == [[]]
