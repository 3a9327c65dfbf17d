"""Batches: every row once per epoch, whole and apart from its neighbours; a function of (seed, step) alone; processes
that share a batch out.
"""

import itertools

import jax
import numpy as np
import pytest

from finetune.packing import Batches, pack, padded
from finetune.rows import Row, stack
from models.errors import InputError


def make_rows(count=37, longest=12, seed=0):
    """Rows whose tokens say which row they belong to, and at which place they stand."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return stack([Row([100 * r + i for i in range(n)], [i % 3 == 1 for i in range(n)]) for r, n in enumerate(lengths)])


def texts_of(batch):
    """The texts of a batch, as tuples of tokens, after checks of all that its arrays say about them."""
    found = []
    for row in zip(*(np.reshape(value, (-1, value.shape[-1])) for value in jax.tree.leaves(batch)), strict=True):
        tokens, targets, segments, positions = row
        used = segments > 0
        assert (np.diff(segments[used]) >= 0).all() and used[: used.sum()].all()
        assert not tokens[~used].any() and not targets[~used].any() and not positions[~used].any()
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            np.testing.assert_array_equal(positions[own], np.arange(own.sum()))
            np.testing.assert_array_equal(targets[own], positions[own] % 3 == 1)
            found.append(tuple(tokens[own].tolist()))
    return found


def all_texts(rows):
    return sorted(tuple(rows.tokens[a:b].tolist()) for a, b in itertools.pairwise(rows.starts))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_has_every_row_once_and_whole(packing, seed):
    rows = make_rows()
    batches = Batches(rows, batch_size=4, length=20, packing=packing, seed=seed)
    for epoch in range(3):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        assert sorted(text for step in steps for text in texts_of(batches(step))) == all_texts(rows)


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_is_a_function_of_seed_and_step(packing):
    rows = make_rows()
    forward = Batches(rows, batch_size=4, length=20, packing=packing, seed=5)
    backward = Batches(rows, batch_size=4, length=20, packing=packing, seed=5)
    steps = range(3 * len(forward))
    first = [forward(step) for step in steps]
    again = [backward(step) for step in reversed(steps)][::-1]
    assert all(map(same, first, again))
    other = Batches(rows, batch_size=4, length=20, packing=packing, seed=6)
    assert not all(same(first[step], other(step)) for step in range(len(forward)))
    assert not all(same(first[step], first[step + len(forward)]) for step in range(len(forward)))


def test_rows_of_a_length_change_their_neighbours_from_epoch_to_epoch():
    rows = stack([Row([r] * 5, [False, True, True, True, True]) for r in range(40)])
    batches = Batches(rows, batch_size=4, length=10)

    def pairs(epoch):
        found = set()
        for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
            tokens = batches(step).tokens.reshape(-1, 10)
            found |= {frozenset(row[[0, -1]].tolist()) for row in tokens}
        return found

    assert len(pairs(0)) == 20 and len(pairs(0) & pairs(1)) < 10


def test_shapes_are_few_and_static():
    rows = make_rows(60, longest=40)
    packed = Batches(rows, batch_size=4, length=48, accumulate=2)
    assert {packed(step).tokens.shape for step in range(len(packed))} == {(2, 2, 48)}
    batches = Batches(rows, batch_size=4, length=48, accumulate=2, packing=False)
    assert {batches(step).tokens.shape for step in range(len(batches))} == {(2, 2, 16), (2, 2, 32), (2, 2, 48)}
    first = packed(0)
    assert [value.dtype for value in (first.tokens, first.targets, first.segments)] == [np.int32, bool, np.int32]


@pytest.mark.parametrize("packing", [True, False])
def test_processes_see_disjoint_parts_of_the_same_batch(packing):
    rows = make_rows()
    options = {"batch_size": 8, "length": 20, "packing": packing, "seed": 2, "accumulate": 2}
    whole = Batches(rows, **options)
    parts = [Batches(rows, **options, process_index=index, process_count=2) for index in range(2)]
    for step in range(2 * len(whole)):
        joined = jax.tree.map(lambda *values: np.concatenate(values, axis=1), *(part(step) for part in parts))
        assert same(joined, whole(step))
        assert not set(texts_of(parts[0](step))) & set(texts_of(parts[1](step)))


def test_micro_batches_share_the_same_rows_out():
    rows = make_rows()
    one, two = (Batches(rows, batch_size=8, length=20, accumulate=count) for count in (1, 2))
    for step in range(len(one)):
        assert sorted(texts_of(one(step))) == sorted(texts_of(two(step)))
    assert one.fingerprint == two.fingerprint


def test_the_fingerprint_tells_what_changes_the_data():
    def of(rows=None, **changes):
        options = {"batch_size": 4, "length": 20} | changes
        return Batches(make_rows() if rows is None else rows, **options).fingerprint

    others = [of(make_rows(seed=1)), of(make_rows(36)), of(seed=1), of(batch_size=8), of(length=24), of(packing=False)]
    assert of() == of() and of() == of(process_index=1, process_count=2)
    assert len({of(), *others}) == 7


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_every_row_and_are_well_filled(seed):
    rng = np.random.default_rng(seed)
    lengths = -np.sort(-rng.integers(1, 33, 300))
    bins = pack(lengths, 32)
    assert sorted(place for places in bins for place in places) == list(range(300))
    assert max(lengths[places].sum() for places in bins) <= 32
    assert len(bins) <= 11 / 9 * -(-lengths.sum() // 32) + 1  # best fit decreasing is within 11/9 of the optimum


def test_a_row_goes_where_it_leaves_the_least_space():
    assert pack(np.array([6, 5, 5, 4, 3, 2]), 10) == [[0, 3], [1, 2], [4, 5]]
    assert pack(np.array([7, 6, 3]), 10) == [[0, 2], [1]]
    assert pack(np.array([4, 4, 4]), 4) == [[0], [1], [2]]


def test_lengths_to_pad_to():
    np.testing.assert_array_equal(padded(np.array([1, 16, 17, 32, 33, 48]), 48), [16, 16, 32, 32, 48, 48])
    np.testing.assert_array_equal(padded(np.array([1, 9]), 10), [10, 10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "accumulate": 4}, "multiple of accumulate 4"),
        ({"batch_size": 6, "accumulate": 3, "process_count": 4}, "number of processes 4"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 4, "seed": -1}, "seed must not be negative"),
        ({"batch_size": 4, "length": 11}, "12 tokens, more than length, 11"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Batches(make_rows(), **({"length": 20} | options))


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        Batches(stack([]), batch_size=1, length=4)
