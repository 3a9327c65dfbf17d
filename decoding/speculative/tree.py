"""Token trees: what a drafter proposes, and the static shapes it may propose them in.

Row 0 is the newest token of the text, which no cache holds yet; every other row is a guess that follows its parent.
Rows stand breadth first, siblings in the order in which they were drawn.

Axis letters: B batch, W rows, T rows of a new level, P rows that may have children, V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.errors import InputError


@struct.dataclass
class TokenTree:
    """A batch of token trees of one width.

    Attributes:
        tokens: i32[B, W]. A negative one is none: the row carries what `Drafter.embed` says, hangs in the tree as any
            other, and is never accepted.
        parent: i32[B or 1, W], a lower row than the row itself; -1 for row 0 and for dead rows.
        depth: i32[B or 1, W], edges between a row and row 0.
        ancestors: bool[B or 1, W, W]; [i, j] is true when j is i or an ancestor of i.
        laws: f32[B, P, V] or None; the law that the children of row i < P were drawn from, first sibling first. Rows
            from P on have no children. None where a rule chose the children, without a draw.
    """

    tokens: jax.Array
    parent: jax.Array
    depth: jax.Array
    ancestors: jax.Array
    laws: jax.Array | None = None

    def law_behind(self, row: jax.Array) -> jax.Array:
        """Returns f32[B, V]: the law that the children of `row` (i32[B]) were drawn from; zeros where it has none."""
        inside = jnp.minimum(row, self.laws.shape[1] - 1)
        law = self.laws[jnp.arange(len(row)), inside]
        return jnp.where((row < self.laws.shape[1])[:, None], law, 0.0)

    def first(self, width: int) -> "TokenTree":
        """Returns the tree of the first `width` rows."""
        laws = None if self.laws is None else self.laws[:, :width]
        ancestors = self.ancestors[:, :width, :width]
        return TokenTree(self.tokens[:, :width], self.parent[:, :width], self.depth[:, :width], ancestors, laws)

    def subtree(self, places: jax.Array, live: jax.Array) -> "TokenTree":
        """Returns the tree of some rows.

        Args:
            places: i32[B, T], rows in rising order, row 0 first; the parents of live rows are among them.
            live: bool[B, T]; the others become dead rows.
        """
        batch, width = places.shape
        index = jnp.arange(batch)[:, None]
        parent, depth = (jnp.broadcast_to(x, self.tokens.shape)[index, places] for x in (self.parent, self.depth))
        new = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], places.shape)
        row_of = jnp.zeros(self.tokens.shape, jnp.int32).at[index, places].set(new)
        parent = jnp.where(live & (parent >= 0), row_of[index, jnp.maximum(parent, 0)], -1)
        above = jnp.broadcast_to(self.ancestors, (batch, *self.ancestors.shape[1:]))
        above = above[index[..., None], places[:, :, None], places[:, None, :]]
        above = above & live[:, None, :] | jnp.eye(width, dtype=bool)[None]  # what is not live is above itself alone
        laws = self.laws
        if laws is not None:
            last = laws.shape[1] - 1
            laws = jnp.where((places <= last)[..., None], laws[index, jnp.minimum(places, last)], 0.0)
        return TokenTree(self.tokens[index, places], parent, depth, above, laws)


@dataclasses.dataclass(frozen=True)
class Template:
    """A static tree: each row as the path of its ranks among siblings, row 0 the empty path.

    Raises:
        InputError: a path whose parent or elder sibling is missing, or rows that are not breadth first.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.paths or self.paths[0] != ():
            raise InputError("a tree's first path must be the empty one, the newest token itself")
        known = set()
        for path, previous in zip(self.paths, [(), *self.paths], strict=False):
            elder = (*path[:-1], path[-1] - 1) if path and path[-1] else ()
            if path in known or len(path) < len(previous) or (path and not {path[:-1], elder} <= known):
                raise InputError(f"tree path {path} is out of order: parents, elder siblings and upper levels go first")
            known.add(path)

    @property
    def width(self) -> int:
        """W, the number of rows."""
        return len(self.paths)

    @property
    def max_depth(self) -> int:
        """Edges between row 0 and the deepest row."""
        return len(self.paths[-1])

    @functools.cached_property
    def parent(self) -> np.ndarray:
        """i32[W]."""
        index = {path: row for row, path in enumerate(self.paths)}
        return np.array([index[path[:-1]] if path else -1 for path in self.paths], np.int32)

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """i32[W], the place of each row among its siblings."""
        return np.array([path[-1] if path else 0 for path in self.paths], np.int32)

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """i32[W]."""
        return np.array([len(path) for path in self.paths], np.int32)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """bool[W, W], as in `TokenTree`."""
        return np.array([[path[: len(other)] == other for other in self.paths] for path in self.paths])

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(start, stop) of the rows at depth 1, 2, ..."""
        edges = np.searchsorted(self.depth, np.arange(1, self.max_depth + 2))
        return [(int(start), int(stop)) for start, stop in itertools.pairwise(edges)]

    @property
    def parents(self) -> int:
        """P: rows that may have children all stand below this one."""
        return int(self.parent.max()) + 1

    def prefix(self, width: int) -> "Template":
        """Returns the tree of the `width` likeliest rows: those with the smallest sum of depth and ranks."""
        order = sorted(self.paths, key=lambda path: (sum(path) + len(path), len(path), path))
        return Template(tuple(sorted(order[:width], key=lambda path: (len(path), path))))

    def tree(self, tokens: jax.Array, laws: jax.Array | None = None) -> TokenTree:
        """Returns tokens i32[B, W] hung into this shape."""
        parent, depth, ancestors = (jnp.asarray(x)[None] for x in (self.parent, self.depth, self.ancestors))
        return TokenTree(tokens, parent, depth, ancestors, laws)


def branching(children: Sequence[int]) -> Template:
    """Returns the tree in which every row at depth d has `children[d]` children."""
    if any(count < 1 for count in children):
        raise InputError(f"every level of a tree needs at least one child per row, got {tuple(children)}")
    levels = [[()]]
    for count in children:
        levels.append([(*path, rank) for path in levels[-1] for rank in range(count)])
    return Template(tuple(path for level in levels for path in level))


def chain(length: int) -> Template:
    """Returns the tree that is a chain of `length` guesses."""
    return branching((1,) * length)


def grown(ancestors: jax.Array, parent: jax.Array) -> jax.Array:
    """Returns bool[B, W + T, W + T]: the ancestors bool[B, W, W] with T rows more, whose parents are i32[B, T]."""
    width, added = ancestors.shape[1], parent.shape[1]
    above = jnp.take_along_axis(ancestors, parent[..., None], axis=1)
    own = jnp.broadcast_to(jnp.eye(added, dtype=bool)[None], (len(parent), added, added))
    upper = jnp.pad(ancestors, ((0, 0), (0, 0), (0, added)))
    return jnp.concatenate([upper, jnp.concatenate([above[..., :width], own], axis=2)], axis=1)
