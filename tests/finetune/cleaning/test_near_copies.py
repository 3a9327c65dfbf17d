"""MinHash: estimates beside exact similarities, copies that are found, others that stay, whatever the order."""

import random

import numpy as np
import pytest

from finetune.cleaning.near_copies import NearCopiesConfig, groups, near_copies_stage, shingles, signatures
from models.errors import InputError

CONFIG = NearCopiesConfig()
WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "rst"]


def text(rng, length=150):
    return " ".join(rng.choices(WORDS, k=length))


def edited(rng, original, edits):
    words = original.split()
    for place in rng.sample(range(len(words)), edits):
        words[place] = "changed"
    return " ".join(words)


def kept(texts, config=CONFIG):
    stage = near_copies_stage(config)
    verdicts = stage.apply(texts, stage.decide([stage.summarize(texts)])[0])
    return [verdict.text for verdict in verdicts if verdict.text is not None]


@pytest.fixture(scope="module")
def corpus():
    """(texts that differ, near copies of some)."""
    rng = random.Random(0)
    originals = [text(rng) for _ in range(12)]
    return originals, [edited(rng, original, 2) for original in originals[:5]] + [originals[6].upper() + "!"]


def test_estimates_are_those_of_jaccard():
    rng = random.Random(1)
    original = text(rng)
    texts = [original, *(edited(rng, original, edits) for edits in (0, 1, 3, 8, 20, 60)), text(rng)]
    hashes, sets = signatures(texts, CONFIG).hashes, [shingles(one, CONFIG.ngram) for one in texts]
    exact = [len(sets[0] & other) / len(sets[0] | other) for other in sets]
    estimates = np.mean(hashes == hashes[0], axis=1)
    assert estimates[0] == estimates[1] == 1 and exact[-1] == estimates[-1] == 0
    assert np.abs(estimates - exact).max() < 4 / np.sqrt(hashes.shape[1]) / 2
    assert 0.5 < exact[3] < 0.95


def test_collisions_of_a_band_follow_the_law():
    """Shares of bands that are equal, over many pairs of one similarity, beside s ** rows."""
    rng, rows = random.Random(2), 2
    config = NearCopiesConfig(bands=128, rows=rows)
    shares, exact = [], []
    for _ in range(12):
        original = text(rng)
        pair = [original, edited(rng, original, 6)]
        a, b = (shingles(one, 5) for one in pair)
        exact.append((len(a & b) / len(a | b)) ** rows)
        hashes = signatures(pair, config).hashes.reshape(2, -1, rows)
        shares.append(np.mean(np.all(hashes[0] == hashes[1], axis=-1)))
    error = np.sqrt(np.mean(exact) * (1 - np.mean(exact)) / (12 * 128))
    assert abs(np.mean(shares) - np.mean(exact)) < 4 * error


def test_copies_go_and_others_stay(corpus):
    originals, copies = corpus
    left = kept([*originals, *copies])
    assert len(left) == len(originals)
    assert set(originals[7:]) | {originals[5]} <= set(left)
    far = [edited(random.Random(3), originals[7], 60), originals[7]]
    assert kept(far) == far, "half of the words are others: not a copy"


def test_order_and_a_second_pass_change_nothing(corpus):
    texts = [*corpus[0], *corpus[1], corpus[0][0]]
    left = kept(texts)
    shuffled = random.Random(4).sample(texts, len(texts))
    assert sorted(kept(shuffled)) == sorted(left)
    assert kept(left) == left
    assert kept([one for one in texts if one in left] + texts) == left, "copies are of one text, not of none"


def test_shards_are_compared_with_each_other(corpus):
    stage, texts = near_copies_stage(CONFIG), [corpus[0][0], corpus[0][1], corpus[1][0]]
    decided = stage.decide([stage.summarize(texts[:1]), stage.summarize([]), stage.summarize(texts[1:])])
    assert [len(part) for part in decided] == [1, 0, 2] and sum(decided[0] + decided[2]) == 2


def test_texts_without_words():
    assert groups(signatures(["", "a", ""], CONFIG), CONFIG) == [0, 1, 0]


@pytest.mark.parametrize("settings", [{"bands": 1}, {"rows": 0}, {"threshold": 0.0}, {"ngram": 0}])
def test_settings_that_do_not_fit(settings):
    with pytest.raises(InputError):
        NearCopiesConfig(**settings)
