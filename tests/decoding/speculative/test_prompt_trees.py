"""Trees that carry prompt tokens: what is pruned, how states follow each other, what a step emits in the long run."""

import numpy as np
import pytest

from decoding.speculative.prompt_trees import (
    PromptTree,
    by_state,
    chain_of,
    end_chances,
    gain,
    hung_prompts,
    path_chances,
    per_step,
    prompt_trees,
    sized_trees,
    stationary,
    trees_of,
)
from decoding.speculative.sizing import LatencyCurve
from decoding.speculative.tree import chain

ACCURACY = ((0.36, 0.12, 0.07, 0.05), (0.22, 0.1, 0.06, 0.04), (0.13, 0.08, 0.05, 0.03))
BUDGETS = (4, 5, 9, 16, 40)
PRUNINGS = ("likely", "random", "none")


@pytest.fixture(scope="module")
def built():
    """{(budget, pruning): trees}."""
    return {(nodes, pruning): prompt_trees(ACCURACY, nodes, 1, pruning) for nodes in BUDGETS for pruning in PRUNINGS}


def simulated(trees, steps=60_000, seed=0, idle=False) -> tuple[float, float]:
    """(mean, its standard error) of the tokens of a step, where offsets are right at the ranks that chances say,
    independently. With `idle`, the released code's chain: behind a step that accepted nothing comes one that emits
    nothing.
    """
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.choice(5, steps, p=[*row, 1 - sum(row)]) for row in ACCURACY], axis=1)
    state, emitted, lost = len(trees) - 1, [], False
    for right in ranks:
        if lost:
            emitted.append(0)
            state, lost = len(trees) - 1, False
            continue
        tree = trees[state]
        row = max(row for row, path in enumerate(tree.template.paths) if path == tuple(right[: len(path)]))
        emitted.append(1 + len(tree.template.paths[row]))
        state, lost = tree.prompts[row], idle and not row
    return float(np.mean(emitted)), float(np.std(emitted) / np.sqrt(steps) * 3)  # steps are not independent


def test_chances_by_hand():
    template = trees_of(ACCURACY, (2, 2, 2), 40, 1, "none")[2].template  # (0,), (1,)
    np.testing.assert_allclose(path_chances(template, ACCURACY), [1, 0.36, 0.12])
    np.testing.assert_allclose(end_chances(template, ACCURACY), [0.52, 0.36, 0.12])
    two = chain(2)
    np.testing.assert_allclose(end_chances(two, ACCURACY), [0.64, 0.36 * 0.78, 0.36 * 0.22])
    assert gain(two, ACCURACY) == pytest.approx(0.36 + 0.36 * 0.22)


def test_one_prompt_and_a_chain():
    """One offset, one guess with its prompt token: 1 + a tokens at every step."""
    trees = prompt_trees((ACCURACY[0][:1],), 3)
    assert [tree.template.width for tree in trees] == [1, 2] and trees[1].prompts == (1, 1)
    assert per_step(trees, ACCURACY)[0] == pytest.approx(1.36)
    fewer = prompt_trees(
        (ACCURACY[0][:1],), 2
    )  # no row for the guess's prompt token: then comes a step without guesses
    assert fewer[1].prompts == (1, 0)
    assert per_step(fewer, ACCURACY)[0] == pytest.approx(1 + 0.36 / 1.36)


def test_every_tree_keeps_to_its_rows(built):
    for (nodes, pruning), trees in built.items():
        assert len(trees) == 4
        for state, tree in enumerate(trees):
            assert tree.template.max_depth <= state and tree.rows(1) <= nodes + 1
            assert tree.prompts[0] in (3, 0) and all(0 <= count <= 3 for count in tree.prompts)
            if pruning == "none":
                assert set(tree.prompts) <= {3} or tree.template.width == 1
    assert any(0 in tree.prompts for tree in built[4, "likely"]), "few rows: guesses without prompt tokens"
    assert built[16, "likely"][3].rows(1) == 17 and built[5, "none"][3].template.width == 1, "no room for 1 + 3 rows"
    for tree in prompt_trees(ACCURACY, 22, copies=4):
        assert tree.rows(4) <= 23 and tree.template.width > tree.template.max_depth > -1


def test_pruning_takes_what_is_worth_least():
    trees = trees_of(ACCURACY, (4, 6, 8), 40, 1, "likely")
    ends, gains = end_chances(trees[3].template, ACCURACY), np.array([gain(tree.template, ACCURACY) for tree in trees])
    before = float(ends @ gains[[3] * len(ends)])
    for room in range(32, 7, -1):
        counts = hung_prompts(ends, gains, room)
        assert counts[0] == 3 and sum(counts[1:]) + len(ends) - 1 == room
        worth = float(ends @ gains[list(counts)])
        others = [float(ends @ gains[list(hung_prompts(ends, gains, room, pruning="random"))])]
        assert worth <= before + 1e-12 and worth >= max(others) - 1e-12
        before = worth
    assert hung_prompts(ends, gains, 8, pruning="none") == (3,) * len(ends)


def test_the_chain_is_one_and_its_steady_state_stays(built):
    for trees in built.values():
        chances = chain_of(trees, ACCURACY)
        np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-12)
        shares = stationary(chances)
        np.testing.assert_allclose(shares @ chances, shares, atol=1e-10)
        assert shares.sum() == pytest.approx(1)


@pytest.mark.parametrize("nodes", [5, 16])
def test_the_steady_state_is_what_a_simulation_comes_to(built, nodes):
    trees = built[nodes, "likely"]
    expected, shares = per_step(trees, ACCURACY)
    assert (shares > 0.02).sum() >= 2, "more than one state"
    mean, error = simulated(trees)
    assert abs(mean - expected) < error
    wrong, error = simulated(trees, idle=True)
    assert expected - wrong > 3 * error, "the chain of the released code has steps that emit nothing"


def test_more_rows_and_better_pruning_emit_more(built):
    tokens = {key: per_step(trees, ACCURACY)[0] for key, trees in built.items()}
    for smaller, larger in zip(BUDGETS, BUDGETS[1:], strict=False):
        assert tokens[smaller, "likely"] <= tokens[larger, "likely"] + 1e-9
    for nodes in BUDGETS:
        assert tokens[nodes, "likely"] >= max(tokens[nodes, "random"], tokens[nodes, "none"]) - 1e-9
    assert tokens[16, "likely"] > tokens[16, "none"] + 0.05


def test_the_size_is_what_pays():
    flat, steep = LatencyCurve((1, 8, 17, 41), (1, 1.01, 1.02, 1.03)), LatencyCurve((1, 8, 17, 41), (1, 3, 7, 20))
    middle = LatencyCurve((1, 8, 17, 41), (1, 1.05, 1.1, 3))
    widest = [max(t.rows(1) for t in sized_trees(ACCURACY, 40, 1, "likely", c)) for c in (flat, middle, steep)]
    assert widest[0] == 41 and 8 <= widest[1] <= 17 and widest[2] == 1
    assert sized_trees(ACCURACY, 40, 1, "likely", steep)[3].prompts == (0,)
    assert sized_trees(ACCURACY, 16, 1, "likely", None) == prompt_trees(ACCURACY, 16)


def test_states_are_those_of_the_simulation_over_texts():
    trees = prompt_trees(ACCURACY, 9)
    states = by_state(trees)
    assert [template.paths for template in states.templates] == [tree.template.paths for tree in trees]
    assert all(len(after) == template.width for template, after in zip(*states, strict=True))
    assert PromptTree(chain(2), (3, 1, 0)).rows(2) == 3 + 8
