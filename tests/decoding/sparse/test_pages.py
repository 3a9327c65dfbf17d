"""Bounds of pages and the choice among them, against plain definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sparse.pages import all_bounds, bounds_of, extended, renewed
from pallas_kernels.flash_decode import slots_of_pages
from pallas_kernels.page_select import chosen_pages, page_scores


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 3, 48, 8)).astype(np.float32)


def scores_of(q: np.ndarray, keys: np.ndarray, logical: int) -> np.ndarray:
    bounds, length = bounds_of(jnp.asarray(keys), logical), jnp.array([48, 48], jnp.int32)
    return np.asarray(page_scores(jnp.asarray(q), bounds, length, page_size=8, logical_size=logical))


@pytest.mark.parametrize("logical", [1, 2, 4, 8])
def test_scores_bound_every_product_in_the_page(keys, logical):
    q = np.random.default_rng(2).normal(size=(2, 3, 2, 8)).astype(np.float32)
    scores = scores_of(q, keys, logical)
    best = np.einsum("bkgd,bksd->bkgs", q, keys).reshape(2, 3, 2, 6, 8).max(axis=4)
    assert (scores >= best - 1e-5).all()
    if logical == 1:
        np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-5)
    whole = scores_of(q, keys, 8)
    assert (scores <= whole + 1e-5).all()
    assert logical == 8 or (scores < whole - 0.1).any()


def test_bounds_kept_during_decoding_equal_those_of_the_whole_prompt(keys):
    """Slots hold garbage until they are written; at each step the bounds of all full pages are right."""
    heads, page, logical = np.array([0, 2]), 8, 2
    garbage = jnp.where(jnp.arange(48)[None, None, :, None] < 11, jnp.asarray(keys), 1e6)
    length = jnp.array([11, 11])
    bounds = more = all_bounds(garbage, heads, page, logical, length)
    expected = bounds_of(jnp.asarray(keys)[:, heads], logical)
    for start in range(11, 49):
        written = jnp.where(jnp.arange(48)[None, None, :, None] <= start, jnp.asarray(keys), 1e6)
        bounds = renewed(bounds, written, heads, jnp.array([start, start]), page)
        full = start // page * (page // logical)
        for name in ("high", "low"):
            np.testing.assert_array_equal(getattr(bounds, name)[:, :, :full], getattr(expected, name)[:, :, :full])
            np.testing.assert_array_equal(getattr(more, name)[:, :, :full], getattr(expected, name)[:, :, :full])
        if start < 48:
            more = extended(more, jnp.asarray(keys)[:, heads, start], jnp.array([start, start]), logical)
    assert np.abs(np.asarray(all_bounds(garbage, heads, page, logical, length).high)[:, :, :6]).max() < 1e6


def test_a_cache_that_ends_inside_a_page(keys):
    short = jnp.asarray(keys[:, :, :45])
    bounds = all_bounds(short, np.array([0, 1, 2]), 8, 2, jnp.array([45, 45]))
    assert bounds.high.shape == (2, 3, 24, 8)
    np.testing.assert_array_equal(bounds.high[:, :, :20], bounds_of(short[:, :, :40], 2).high)


def test_chosen_pages_are_the_best_full_ones_and_the_newest():
    scores = jnp.asarray(np.random.default_rng(4).normal(size=(3, 2, 9)), jnp.float32).at[:, :, 6:].set(99.0)
    pages = np.asarray(chosen_pages(scores, jnp.array([6 * 4 + 1, 2 * 4 + 4, 1], jnp.int32), 4, page_size=4))
    for row, newest in enumerate((6, 2, 0)):
        for head, chosen in enumerate(pages[row]):
            assert chosen[-1] == newest
            best = np.argsort(-np.asarray(scores)[row, head, :newest])[:3]
            assert sorted(chosen[:-1]) == sorted([*best, *[-1] * (3 - len(best))])
    slots = slots_of_pages(jnp.asarray(pages[0, :1]), jnp.array([25]), 4)
    expected = [slot for page in pages[0, 0] for slot in range(4 * page, 4 * page + 4)]
    assert slots[0].tolist() == [slot if slot < 25 else -1 for slot in expected]
    assert set(slots_of_pages(jnp.full((1, 2), -1), jnp.array([25]), 4)[0].tolist()) == {-1}
