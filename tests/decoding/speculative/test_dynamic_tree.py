"""Dynamic trees against searches in plain Python, over a head that is a table of laws, one per prefix."""

import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.speculative.dynamic_tree import Growth, best_rows, dynamic_tree
from decoding.speculative.tree import TokenTree, chain

VOCAB, DEPTH, BATCH = 5, 3, 40
COUNT = sum(VOCAB**depth for depth in range(DEPTH))
TABLE = np.random.default_rng(0).dirichlet([0.7] * VOCAB, (BATCH, COUNT)).astype(np.float32)
LAST = np.full(BATCH, 3, np.int32)  # the newest token; no law depends on it


def child(prefix, token):
    """A prefix's number with a token behind it: nodes of a heap."""
    return prefix * VOCAB + 1 + token


def guess(level, carry):
    """Reads the laws of a level's rows by their parents, and checks what it is told of their ancestors."""
    prefix, seen = carry
    rows = jnp.arange(BATCH)[:, None]
    if level is None:
        prefix = jnp.zeros((BATCH, 1), jnp.int32)
        return jnp.log(jnp.asarray(TABLE)[rows, prefix]), (prefix, [])
    prefix = child(jnp.take_along_axis(prefix, level.parent, axis=1), level.tokens)
    seen = [*seen, (level, prefix)]
    return jnp.log(jnp.asarray(TABLE)[rows, prefix]), (prefix, seen)


def paths_of(tree: TokenTree, row: int) -> dict[tuple[int, ...], int]:
    """{path of tokens: its place} of the live rows of one tree, the empty path the first."""
    tokens, parent, depth = (np.asarray(x)[row].tolist() for x in (tree.tokens, tree.parent, tree.depth))
    found = {(): 0}
    by_place = {0: ()}
    for place in range(1, len(tokens)):
        if parent[place] < 0:
            continue
        assert parent[place] < place and parent[place] in by_place, "parents come first, and are in the tree"
        by_place[place] = (*by_place[parent[place]], tokens[place])
        assert depth[place] == len(by_place[place])
        above = {by_place[other] for other in np.flatnonzero(np.asarray(tree.ancestors)[row, place])}
        assert above == {by_place[place][:length] for length in range(len(by_place[place]) + 1)}
        found[by_place[place]] = place
    assert len(found) == len(by_place), "no path twice"
    return found


def law(row: int, path: tuple[int, ...]) -> np.ndarray:
    prefix = 0
    for token in path:
        prefix = child(prefix, token)
    return TABLE[row, prefix].astype(np.float64)


def best_first(row: int, nodes: int, keep=None) -> dict[tuple[int, ...], float]:
    """The likeliest paths, always taking the best guess that is open next."""
    found: dict[tuple[int, ...], float] = {}
    opened = [(-1.0, ())]
    while opened and len(found) <= nodes:
        value, path = heapq.heappop(opened)
        found[path] = -value
        if len(path) < DEPTH:
            chances = law(row, path)
            for token in range(VOCAB):
                if keep is None or keep(np.sort(chances)[::-1])[np.argsort(-chances).tolist().index(token)]:
                    heapq.heappush(opened, (value * chances[token], (*path, token)))
    return found


def grown(growth: Growth):
    tree, value = jax.jit(lambda: dynamic_tree(growth, jnp.asarray(LAST), guess, (None, [])))()
    assert tree.tokens[:, 0].tolist() == LAST.tolist() and tree.tokens.shape[1] == growth.width(VOCAB)
    return tree, np.asarray(value)


@pytest.mark.parametrize("nodes", [1, 4, 9])
def test_a_wide_beam_finds_what_best_first_search_finds(nodes):
    tree, value = grown(Growth(nodes, DEPTH, max(nodes, VOCAB)))
    sizes = set()
    for row in range(BATCH):
        found, wanted = paths_of(tree, row), best_first(row, nodes)
        assert set(found) == set(wanted)
        for path, place in found.items():
            np.testing.assert_allclose(np.exp(value[row, place]), wanted[path], rtol=1e-4)
        sizes.add(max(len(path) for path in found))
    assert nodes == 1 or len(sizes) > 1, "trees differ in depth"


def test_a_narrow_beam_expands_and_reranks():
    """Section 4 of the paper, step by step: only the best rows of a level have children, all rows are reranked."""
    nodes, beam = 7, 2
    tree, _ = grown(Growth(nodes, DEPTH, beam))
    differ = 0
    for row in range(BATCH):
        level, scored = {(): 1.0}, {(): 1.0}
        for _ in range(DEPTH):
            best = sorted(level, key=lambda path: -level[path])[:beam]
            level = {
                (*path, int(token)): level[path] * law(row, path)[token]
                for path in best
                for token in np.argsort(-law(row, path))[:beam]
            }
            scored |= level
        wanted = set(sorted(scored, key=lambda path: (-scored[path], len(path)))[: nodes + 1])
        assert set(paths_of(tree, row)) == wanted
        differ += wanted != set(best_first(row, nodes))
    assert differ, "or the beam was not narrow"


def test_what_a_head_would_not_keep_stays_out_and_live_rows_come_first():
    def keep(log_chance):
        return jnp.exp(log_chance) > 0.3

    tree, _ = grown(Growth(9, DEPTH, 9, keep))
    counts = set()
    for row in range(BATCH):
        found = paths_of(tree, row)
        assert set(found) == set(best_first(row, 9, lambda chances: chances > 0.3))
        assert sorted(found.values()) == list(range(len(found)))
        counts.add(len(found))
    assert min(counts) < 10 == max(counts)


def test_levels_tell_the_head_who_follows_whom():
    @jax.jit
    def told():
        levels = []

        def noting(level, carry):
            levels.append(level)
            return guess(level, carry)

        dynamic_tree(Growth(6, DEPTH, 3), jnp.asarray(LAST), noting, (None, []))
        return levels

    levels = told()
    assert [level and int(level.depth) for level in levels] == [None, 1, 2]
    first, second = levels[1:]
    assert first.steps.tolist() == [[0] * 3] and second.steps.tolist() == [[0] * 3 + [1] * 3]
    np.testing.assert_array_equal(first.ancestors, np.broadcast_to(np.eye(3, dtype=bool), (BATCH, 3, 3)))
    for row, place in itertools.product(range(BATCH), range(3)):
        above = np.flatnonzero(second.ancestors[row, place]).tolist()
        assert above == [int(second.parent[row, place]), 3 + place]


def test_a_beam_of_one_is_a_chain():
    tree, _ = grown(Growth(9, DEPTH, 1))
    assert tree.tokens.shape[1] == 1 + DEPTH
    np.testing.assert_array_equal(tree.parent, np.broadcast_to(chain(DEPTH).parent, tree.parent.shape))
    for row in range(BATCH):
        path = ()
        for _ in range(DEPTH):
            path = (*path, int(np.argmax(law(row, path))))
        assert path in paths_of(tree, row)


def test_rows_left_out_stand_last_and_dead():
    tree = chain(3).tree(jnp.asarray([[7, 8, 9, 10]]))
    kept, places = best_rows(tree, jnp.asarray([[0.0, -1.0, -jnp.inf, -jnp.inf]]), 3)
    assert kept.tokens[0, :2].tolist() == [7, 8] and kept.parent.tolist() == [[-1, 0, -1]]
    assert places[0, :2].tolist() == [0, 1]
    assert kept.ancestors[0, :2].tolist() == [[True, False, False], [True, True, False]]
