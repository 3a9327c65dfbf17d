"""Static trees from calibration: which guesses of a head are worth a row.

`accuracy[k][r]` is how often the guess of rank r at offset k is the right token, counted on held-out text (offset 0 is
the token behind the newest one). A path of ranks is right with about the product of these chances, and a tree of given
size is grown greedily by them (Medusa, 2401.10774, section 2.3.3). Chances at later offsets are not independent of
those before: what is right early is often right later, so that trees accept more than the products say.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from decoding.speculative.sizing import MARGIN, LatencyCurve
from decoding.speculative.tree import Template
from models.errors import InputError

RANKS = 10  # that are counted, at each offset
Accuracy = tuple[tuple[float, ...], ...]


def usual_accuracy(offsets: int) -> Accuracy:
    """Returns what small heads come to, roughly, for heads that were never calibrated."""
    return tuple(tuple(0.25 * 0.5**offset / (1 + rank) for rank in range(RANKS)) for offset in range(offsets))


def check_accuracy(accuracy: Sequence[Sequence[float]]) -> None:
    """Raises InputError unless these are chances: one row per offset, as many ranks in each."""
    sizes = {len(row) for row in accuracy}
    if not accuracy or len(sizes) != 1 or 0 in sizes:
        raise InputError(f"accuracy needs a row of chances per offset, all of one length; got lengths {sorted(sizes)}")
    if not all(0 <= chance <= 1 for row in accuracy for chance in row):
        raise InputError("accuracy holds chances, each from 0 to 1")


def calibrated(accuracy: Sequence[Sequence[float]], nodes: int) -> list[tuple[tuple[int, ...], float]]:
    """Returns the paths of the likeliest `nodes` guesses and their chances, the likeliest first; fewer where there are
    no more.

    Of all next siblings and first children of what was chosen, the one with the greatest product comes next, so that
    parents and elder siblings come before a path. On a tie the shorter path comes first.

    Args:
        accuracy: chances by offset and rank.
        nodes: how many guesses.
    """
    chosen: list[tuple[tuple[int, ...], float]] = []
    frontier: list[tuple[float, int, tuple[int, ...], float]] = []

    def offer(path: tuple[int, ...], parent: float) -> None:
        if len(path) <= len(accuracy) and path[-1] < len(accuracy[len(path) - 1]):
            heapq.heappush(frontier, (-parent * accuracy[len(path) - 1][path[-1]], len(path), path, parent))

    offer((0,), 1.0)
    while frontier and len(chosen) < nodes:
        chance, _, path, parent = heapq.heappop(frontier)
        chosen.append((path, -chance))
        offer((*path[:-1], path[-1] + 1), parent)
        offer((*path, 0), -chance)
    return chosen


def calibrated_tree(
    accuracy: Sequence[Sequence[float]], nodes: int, latency: LatencyCurve | None = None
) -> tuple[Template, float]:
    """Returns the tree of the likeliest guesses, and the tokens that a step with it is expected to emit.

    Args:
        accuracy: chances by offset and rank.
        nodes: guesses, at most.
        latency: what passes and drafting cost here. With it only so many guesses are kept as give most tokens per
            second; none where plain decoding does.
    """
    found = calibrated(accuracy, nodes)
    gains = np.cumsum([1.0, *(chance for _, chance in found)])
    rows = len(found) + 1
    if latency is not None:
        sizes = np.unique(np.minimum(latency.sizes, rows))
        speed = gains[sizes - 1] / latency.of_steps(sizes)
        rows = int(sizes[np.argmax(speed * np.where(sizes == 1, MARGIN, 1.0))])
    paths = sorted([(), *(path for path, _ in found[: rows - 1])], key=lambda path: (len(path), path))
    return Template(tuple(paths)), float(gains[rows - 1])


class StateTrees(NamedTuple):
    """The trees of a head by state: which row is accepted decides which tree the next step has.

    Attributes:
        templates: the tree of each state; a text starts in the last one.
        after: i[W] for each, the state behind each row.
    """

    templates: tuple[Template, ...]
    after: tuple[np.ndarray, ...]


def one_state(template: Template) -> StateTrees:
    """Returns the trees of a head that has one tree at every step."""
    return StateTrees((template,), (np.zeros(template.width, np.int64),))


def one_tree(config: Any, accuracy: Accuracy, nodes: int) -> StateTrees:
    """Returns the tree of the likeliest guesses as that of every step: what most heads draft with."""
    return one_state(calibrated_tree(accuracy, nodes)[0])


def accepted_row(template: Template, ranks: np.ndarray) -> np.ndarray:
    """Returns i64[N]: the row of a tree at each of N places behind which no guess is right any more.

    Args:
        template: the tree.
        ranks: i[N, K], at which rank the head has the right token of each offset.
    """
    found = np.zeros(len(ranks), np.int64)
    for row, path in enumerate(template.paths[1:], 1):  # breadth first: the last right one is the deepest
        right = (ranks[:, : len(path)] == np.array(path)[None, :]).all(axis=1)
        found = np.where(right, row, found)
    return found
