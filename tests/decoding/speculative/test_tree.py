"""Tree shapes against naive walks over their paths."""

import jax.numpy as jnp
import numpy as np
import pytest

from decoding.speculative.token_recycling import paper_template
from decoding.speculative.tree import Template, branching, chain
from models.errors import InputError

UNEVEN = Template(((), (0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0)))
TEMPLATES = {
    "root": chain(0),
    "chain": chain(5),
    "branching": branching((3, 2, 1)),
    "wide": branching((7,)),
    "uneven": UNEVEN,
    "paper": paper_template(),
    "prefix": paper_template().prefix(17),
}


def walk(parent: np.ndarray, row: int) -> list[int]:
    """Returns the row and its ancestors, by following parents."""
    path = []
    while row >= 0:
        path.append(row)
        row = int(parent[row])
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_templates_arrays_tell_of_the_same_tree(name):
    template = TEMPLATES[name]
    parent, rank, depth = template.parent, template.rank, template.depth
    width = template.width
    assert parent.dtype == rank.dtype == depth.dtype == np.int32 and template.ancestors.dtype == bool
    assert parent.shape == rank.shape == depth.shape == (width,) and template.ancestors.shape == (width, width)
    assert parent[0] == -1 and (parent[1:] >= 0).all() and (parent < np.arange(width)).all()
    for row in range(width):
        path = walk(parent, row)
        assert depth[row] == len(path) - 1
        assert tuple(rank[i] for i in path[-2::-1]) == template.paths[row]
        assert np.flatnonzero(template.ancestors[row]).tolist() == sorted(path)
    assert (np.diff(depth) >= 0).all() and template.max_depth == depth.max()
    for row in range(width):
        siblings = np.flatnonzero(parent == row)
        assert rank[siblings].tolist() == list(range(len(siblings))), "siblings stand in the order of their ranks"


@pytest.mark.parametrize("name", TEMPLATES)
def test_levels_and_parents(name):
    template = TEMPLATES[name]
    assert len(template.levels) == template.max_depth
    rows = [0]
    for depth, (start, stop) in enumerate(template.levels, 1):
        assert (template.depth[start:stop] == depth).all() and stop > start
        rows += range(start, stop)
    assert rows == list(range(template.width)), "levels cover every row below row 0 once"
    with_children = {int(parent) for parent in template.parent[1:]}
    assert template.parents == max(with_children, default=-1) + 1


def test_branching_and_chain():
    template = branching((2, 3))
    assert template.width == 1 + 2 + 6 and template.max_depth == 2
    assert np.bincount(template.parent[1:]).tolist() == [2, 3, 3] and template.parents == 3
    assert template.levels == [(1, 3), (3, 9)]
    assert chain(4) == branching((1, 1, 1, 1)) and chain(4).parent.tolist() == [-1, 0, 1, 2, 3]
    assert branching(()).paths == ((),) == chain(0).paths
    assert hash(branching((2, 3))) == hash(template), "a template is a static argument"


@pytest.mark.parametrize("width", [1, 2, 3, 9, 17, 40, 81, 200])
def test_prefix_keeps_the_likeliest_rows(width):
    whole = paper_template()
    part = whole.prefix(width)
    assert part.width == min(width, 81) and set(part.paths) <= set(whole.paths)
    cost = [len(path) + sum(path) for path in part.paths]
    left_out = [len(path) + sum(path) for path in set(whole.paths) - set(part.paths)]
    assert max(cost) <= min(left_out, default=100)
    assert part.prefix(width) == part


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ((), "first path must be the empty one"),
        (((0,),), "first path must be the empty one"),
        (((), (1,)), r"\(1,\) is out of order"),
        (((), (0,), (2,)), r"\(2,\) is out of order"),
        (((), (-1,)), r"\(-1,\) is out of order"),
        (((), (0, 0)), r"\(0, 0\) is out of order"),
        (((), (0,), (1, 0)), r"\(1, 0\) is out of order"),
        (((), (0,), (0, 0), (1,)), r"\(1,\) is out of order"),
        (((), (0,), (0,)), r"\(0,\) is out of order"),
        (((), ()), r"\(\) is out of order"),
    ],
    ids=str,
)
def test_paths_that_are_no_tree(paths, words):
    with pytest.raises(InputError, match=words):
        Template(paths)


def test_impossible_sizes():
    for children in ((2, 0), (-1,)):
        with pytest.raises(InputError, match=r"at least one child per row, got \("):
            branching(children)
    with pytest.raises(InputError, match="first path"):
        chain(3).prefix(0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tree_hangs_tokens_into_the_shape(name):
    template = TEMPLATES[name]
    tokens = jnp.arange(2 * template.width, dtype=jnp.int32).reshape(2, -1)
    laws = jnp.ones((2, template.parents, 3))
    tree = template.tree(tokens, laws)
    assert tree.tokens is tokens and tree.laws is laws and template.tree(tokens).laws is None
    for array, own in ((tree.parent, "parent"), (tree.depth, "depth"), (tree.ancestors, "ancestors")):
        assert array.shape[0] == 1, "one shape for the whole batch"
        np.testing.assert_array_equal(array[0], getattr(template, own))
        assert array.dtype == getattr(template, own).dtype


def test_rows_that_are_not_live_are_above_no_row():
    """Dead rows may stand for a row that is live: no live row may see them."""
    template = branching((2, 2))
    tree = template.tree(jnp.arange(7)[None, :])
    places = jnp.asarray([[0, 1, 6, 6, 6]])
    live = jnp.asarray([[True, True, False, False, False]])
    small = tree.subtree(places, live)
    assert small.ancestors[0, :2, 2:].sum() == 0
    places, live = jnp.asarray([[0, 2, 6, 6, 6]]), jnp.asarray([[True, True, True, False, False]])
    small = tree.subtree(places, live)
    np.testing.assert_array_equal(small.ancestors[0, 2], [True, True, True, False, False])
    assert small.parent[0].tolist()[:3] == [-1, 0, 1] and (small.parent[0, 3:] == -1).all()
