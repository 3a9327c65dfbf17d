"""DySpec: the tree of highest value against a heap, one draw at a time."""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.speculative.dyspec import Candidates, DySpecOptions, add_level, draw_values, pruned
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, texts

VOCAB, DEPTH = 6, 4
RNG = np.random.default_rng(3)
BATCH = 5


@functools.cache
def law_behind(row: int, path: tuple[int, ...]) -> np.ndarray:
    """Returns f32[V]: the draft's law behind a path of tokens; a table that is made as it is looked at."""
    return np.random.default_rng([row, len(path), *path]).dirichlet(np.full(VOCAB, 0.5)).astype(np.float32)


def heap_tree(row: int, budget: int, exponent: float) -> list[tuple[tuple[int, ...], float]]:
    """Algorithm 1 with the likeliest token in place of a draw: (path, value) in the order of growth."""
    entries, grown = [(-1.0, (), 0)], []  # value, parent's path, how many of its children are drawn
    while len(grown) < budget:
        negative, parent, rank = heapq.heappop(entries)
        if len(parent) >= DEPTH or rank >= VOCAB:
            continue
        law = law_behind(row, parent).astype(np.float64)
        order = np.argsort(-law, kind="stable")
        left = 1.0 - law[order[:rank]].sum()
        chance = min(law[order[rank]] / left, 1.0) ** exponent
        path = (*parent, int(order[rank]))
        grown.append((path, -negative))
        heapq.heappush(entries, (negative * (1 - chance), parent, rank + 1))
        heapq.heappush(entries, (negative * chance, path, 0))
    return grown


def layered_tree(options: DySpecOptions):
    """Returns the tree and its candidates, grown level by level from the same table."""
    one = jnp.ones((BATCH, 1))
    zero = jnp.zeros((BATCH, 1), jnp.int32)
    tree = Candidates(zero, zero - 1, zero, jnp.ones((BATCH, 1, 1), bool), one * jnp.inf, one)
    keys, ranked = jax.random.split(jax.random.key(0), BATCH), jnp.ones((BATCH,), bool)
    paths, new, laws = [[()] for _ in range(BATCH)], 1, []
    for _ in range(options.depth):
        laws.append(np.stack([[law_behind(b, path) for path in paths[b][-new:]] for b in range(BATCH)]))
        tree = add_level(tree, jnp.asarray(laws[-1]), keys, ranked, options)
        new = tree.tokens.shape[1] - len(paths[0])
        for b in range(BATCH):
            rows = zip(tree.parent[b, -new:].tolist(), tree.tokens[b, -new:].tolist(), strict=True)
            paths[b] += [(*paths[b][parent], token) for parent, token in rows]
    return tree, paths, jnp.asarray(np.concatenate(laws, axis=1))


@pytest.mark.parametrize("exponent", [1.0, 0.4])
@pytest.mark.parametrize("budget", [1, 4, 9, 14])
def test_levels_and_pruning_equal_the_heap(budget, exponent):
    """With a frontier wide enough for every row that the heap would draw, both grow the same tree."""
    options = DySpecOptions(budget=budget, frontier=14, depth=DEPTH, children=VOCAB, exponent=exponent)
    candidates, paths, laws = layered_tree(options)
    tree, places = pruned(candidates, laws, budget + 1)
    for b in range(BATCH):
        expected = heap_tree(b, budget, exponent)
        values = [value for _, value in expected]
        assert all(after <= before + 1e-6 for before, after in zip(values, values[1:], strict=False))
        assert {paths[b][place] for place in places[b].tolist()} == {()} | {path for path, _ in expected}


def test_the_estimate_can_be_any_function():
    of_power, given = (
        layered_tree(DySpecOptions(frontier=6, depth=DEPTH, children=3, **how))[0]
        for how in ({"exponent": 0.5}, {"estimate": jnp.sqrt})
    )
    np.testing.assert_allclose(of_power.value[:, 1:], given.value[:, 1:], rtol=1e-5)
    with pytest.raises(InputError, match="estimate must be a function"):
        DySpecOptions(estimate=0.5)


def test_pruned_trees_hang_together():
    candidates, paths, laws = layered_tree(DySpecOptions(frontier=6, depth=DEPTH, children=3))
    tree, places = pruned(candidates, laws, 10)
    for b in range(BATCH):
        own = [paths[b][place] for place in places[b].tolist()]
        assert own[0] == () and sorted(own, key=len) == own
        for row in range(1, 10):
            assert own[int(tree.parent[b, row])] == own[row][:-1] and tree.depth[b, row] == len(own[row])
            np.testing.assert_array_equal(tree.ancestors[b, row], [own[row][: len(p)] == p for p in own])
            if len(own[row]) < DEPTH:
                np.testing.assert_allclose(tree.laws[b, row], law_behind(b, own[row]), rtol=1e-6)
            elders = [r for r in range(1, row) if own[r][:-1] == own[row][:-1]]
            drawn = law_behind(b, own[row][:-1])
            assert all(drawn[own[r][-1]] >= drawn[own[row][-1]] for r in elders), "siblings stand in draw order"


def test_values_are_the_chances_of_the_paper():
    law, reached = np.array([[[0.5, 0.3, 0.2]]], np.float32), np.array([[0.8]], np.float32)
    value, chance = draw_values(jnp.asarray(law), jnp.asarray([[[0, 2, 1]]]), jnp.asarray(reached), lambda p: p)
    np.testing.assert_allclose(value[0, 0], [0.8, 0.4, 0.4 * 0.6], rtol=1e-5)
    np.testing.assert_allclose(chance[0, 0], [0.4, 0.4 * 0.4, 0.4 * 0.6 * 1.0], rtol=1e-5)


def test_a_budget_of_one_is_a_chain_of_one(tiny):
    model, params = tiny
    draft = jax.tree.map(lambda x: x + 0.05 * jnp.std(x), params)
    tree = make_decode_fn(model, "dyspec", max_new_tokens=ROOM, draft=model, budget=1, depth=1)
    chain = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model, length=1)
    ours, theirs = (fn(WithDraft(params, draft), PROMPTS) for fn in (tree, chain))
    assert texts(ours) == texts(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours.stats, theirs.stats)


@pytest.mark.parametrize("name", ["budget", "frontier", "depth", "children", "exponent"])
def test_options_that_cannot_be(tiny, name):
    with pytest.raises(InputError, match=name):
        make_decode_fn(tiny[0], "dyspec", draft=tiny[0], **{name: 0})
