"""Trees from calibration: the likeliest guesses, as many as asked for or as pay."""

import itertools

import numpy as np
import pytest

from decoding.speculative.draft_head import HeadOptions
from decoding.speculative.head_trees import (
    RANKS,
    accepted_row,
    calibrated,
    calibrated_tree,
    check_accuracy,
    usual_accuracy,
)
from decoding.speculative.medusa import MedusaConfig, MedusaOptions
from decoding.speculative.sizing import LatencyCurve
from decoding.speculative.tree import chain
from models.errors import InputError

ACCURACY = ((0.5, 0.2, 0.1), (0.4, 0.15, 0.05), (0.3, 0.1, 0.02))  # falls with the rank


def test_greedy_growth_finds_the_greatest_products():
    products = {
        path: np.prod([ACCURACY[k][rank] for k, rank in enumerate(path)])
        for depth in (1, 2, 3)
        for path in itertools.product(range(3), repeat=depth)
    }
    for nodes in (1, 4, 11, 39):
        found = calibrated(ACCURACY, nodes)
        best = sorted(products.values(), reverse=True)[:nodes]
        np.testing.assert_allclose([chance for _, chance in found], best, rtol=1e-12)
        assert all(products[path] == pytest.approx(chance) for path, chance in found)
    assert len(calibrated(ACCURACY, 100)) == 39, "there are no more"


def test_trees_are_closed_and_grow_by_nodes_only():
    smaller = {()}
    for nodes in (1, 4, 16, 30):
        template, gain = calibrated_tree(ACCURACY, nodes)
        assert template.width == nodes + 1 and smaller <= set(template.paths)
        chances = dict(calibrated(ACCURACY, nodes))
        assert gain == pytest.approx(1 + sum(chances.values()))
        smaller = set(template.paths)
    assert calibrated_tree(((0.9,), (0.8,)), 2)[0] == chain(2)


def test_a_rank_that_is_less_often_right_than_the_next_comes_first_still():
    paths = [path for path, _ in calibrated(((0.1, 0.6, 0.2),), 3)]
    assert paths == [(0,), (1,), (2,)]


@pytest.mark.parametrize(
    ("seconds", "width"), [((1, 1.01, 1.02, 1.03), 31), ((1, 1.2, 4, 9), 5), ((1, 3, 6, 20), 1)]
)  # fmt: skip
def test_only_guesses_that_pay_are_kept(seconds, width):
    curve = LatencyCurve((1, 5, 16, 31), seconds)
    template, gain = calibrated_tree(ACCURACY, 30, curve)
    assert template.width == width and (gain > 1) == (width > 1)


def test_the_accepted_row_is_the_end_of_the_longest_right_path():
    template, _ = calibrated_tree(ACCURACY, 16)
    ranks = np.random.default_rng(0).integers(-1, 4, (300, 3))
    for row, found in zip(ranks, accepted_row(template, ranks), strict=True):
        right = [path for path in template.paths if path == tuple(row[: len(path)])]
        assert template.paths[found] == max(right, key=len)


def test_errors():
    for bad, words in (((), "a row of chances"), (((0.5,), (0.2, 0.1)), "of one length"), (((1.5,),), "from 0 to 1")):
        with pytest.raises(InputError, match=words):
            check_accuracy(bad)
    check_accuracy(usual_accuracy(4))
    assert len(usual_accuracy(4)[3]) == RANKS
    with pytest.raises(InputError, match="the head has 3 offsets: offsets must be 1 to that, got 4"):
        MedusaOptions(offsets=4)
    with pytest.raises(InputError, match="accuracy covers 2 offsets, but the tree may be 3 deep"):
        MedusaOptions(accuracy=ACCURACY[:2])
    assert MedusaOptions(accuracy=ACCURACY[:2], offsets=2).template(61).max_depth == 2
    with pytest.raises(InputError, match="nodes must be at least 1"):
        MedusaOptions(nodes=0)
    with pytest.raises(InputError, match="head must be a MedusaConfig"):
        MedusaOptions(head="heads.safetensors")
    with pytest.raises(InputError, match="offsets must be at least 1"):
        MedusaConfig(offsets=0)
    assert issubclass(MedusaOptions, HeadOptions)
