"""Trees that draft the next step as they verify this one: which guesses get a row, and how many rows of prompt tokens
hang on each of them.

Source: "Hardware-Aware Parallel Prompt Decoding" (2405.18628), sections 3.2 and 3.3. The guesses of a step are the
outputs of the prompt tokens that hung on the row accepted last: s of them, the state, allow a tree of depth s. With a
the accuracies (`decoding.speculative.head_trees`) and T_s the tree of state s:

    p_c  = a(path to c) - sum of a(path to child) over the children of c     the accepted path ends at c
    f_s  = sum of a(path to c) over the guesses c of T_s                     guesses that are accepted, expected
    M_sj = sum of p_c over the rows c of T_s with j prompt tokens            the next state
    pi M = pi,  tokens per step = 1 + sum_s pi_s f_s

All prompt tokens hang on every guess at first; as long as there are more rows than allowed, the one that is worth
least, p_c (f_j - f_(j-1)) with j left on c, goes. How many guesses a tree has is searched for.

Deviations. Row 0 always has all prompt tokens, so that nothing accepted leads to the deepest tree; the released code
counts a step there that emits nothing. The number of rows is that of the whole pass, row 0's prompt tokens included
(released: they come on top). A guess may lose its last prompt token: state 0, a step without guesses, which pays where
rows are few. Guesses are searched for in every state, one state after the other until nothing is gained (released: 10
in state 1, all pairs in states 2 and 3), and any number of prompt tokens is allowed.

Axis letters: S states, W rows, K offsets.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from decoding.speculative.head_trees import Accuracy, StateTrees, calibrated
from decoding.speculative.sizing import MARGIN, LatencyCurve
from decoding.speculative.tree import Template

Pruning = Literal["likely", "random", "none"]
_TRIES = 12  # numbers of guesses that are tried for a state
_NOTHING = Template(((),))


@dataclasses.dataclass(frozen=True)
class PromptTree:
    """A tree of guesses, and how many prompt tokens hang on each of its rows."""

    template: Template
    prompts: tuple[int, ...]

    def rows(self, copies: int) -> int:
        """Rows of the pass, with so many copies of each prompt token."""
        return self.template.width + copies * sum(self.prompts)


Trees = tuple[PromptTree, ...]  # by state, 0 to K


def path_chances(template: Template, accuracy: Accuracy) -> np.ndarray:
    """Returns f64[W]: the chance of each row to be right, and all above it; 1 for row 0."""
    chance = np.ones(template.width)
    for row in range(1, template.width):
        chance[row] = chance[template.parent[row]] * accuracy[template.depth[row] - 1][template.rank[row]]
    return chance


def end_chances(template: Template, accuracy: Accuracy) -> np.ndarray:
    """Returns f64[W]: the chance of each row to be the last accepted one."""
    chance = path_chances(template, accuracy)
    ends = chance.copy()
    np.subtract.at(ends, template.parent[1:], chance[1:])
    return np.maximum(ends, 0.0)


def gain(template: Template, accuracy: Accuracy) -> float:
    """Returns f: how many guesses of a tree are accepted, expected."""
    return float(path_chances(template, accuracy)[1:].sum())


def hung_prompts(
    ends: np.ndarray, gains: np.ndarray, room: int, copies: int = 1, pruning: Pruning = "likely"
) -> tuple[int, ...]:
    """Returns how many prompt tokens stay on each row of a tree.

    Args:
        ends: f64[W], as `end_chances` has it.
        gains: f64[K + 1], what each state is worth.
        room: rows for guesses and their prompt tokens, at least W - 1.
        copies: rows of a prompt token.
        pruning: which go first: those worth least, or any (from a fixed seed); `none` leaves all.
    """
    most, rng = len(gains) - 1, np.random.default_rng(0)
    counts = np.full(len(ends), most)
    worth = ends[:, None] * np.diff(gains)[None, :]
    while pruning != "none" and len(ends) - 1 + copies * counts[1:].sum() > room:
        left = np.flatnonzero(counts[1:])[::-1] + 1  # of those worth the same the last
        gone = rng.choice(left) if pruning == "random" else left[np.argmin(worth[left, counts[left] - 1])]
        counts[gone] -= 1
    return tuple(counts.tolist())


def chain_of(trees: Trees, accuracy: Accuracy) -> np.ndarray:
    """Returns M f64[S, S]: the chance of each state to follow each."""
    chances = np.zeros((len(trees), len(trees)))
    for state, tree in enumerate(trees):
        np.add.at(chances[state], list(tree.prompts), end_chances(tree.template, accuracy))
    return chances / chances.sum(axis=1, keepdims=True)


def stationary(chances: np.ndarray) -> np.ndarray:
    """Returns pi f64[S] with pi M = pi, of M f64[S, S]."""
    size = len(chances)
    equations = np.concatenate([chances.T - np.eye(size), np.ones((1, size))])
    found = np.linalg.lstsq(equations, np.array([0.0] * size + [1.0]), rcond=None)[0]
    return np.maximum(found, 0.0) / np.maximum(found, 0.0).sum()


def per_step(trees: Trees, accuracy: Accuracy) -> tuple[float, np.ndarray]:
    """Returns (tokens that a step emits in the long run, f64[S] the share of each state)."""
    shares = stationary(chain_of(trees, accuracy))
    return 1.0 + float(shares @ [gain(tree.template, accuracy) for tree in trees]), shares


def trees_of(accuracy: Accuracy, guesses: Sequence[int], room: int, copies: int, pruning: Pruning) -> Trees:
    """Returns the trees of states 0 to K with so many guesses in the states from 1 on, at most."""
    templates = [_NOTHING]
    for state, count in enumerate(guesses, 1):
        paths = [(), *(path for path, _ in calibrated(accuracy[:state], count))]
        templates.append(Template(tuple(sorted(paths, key=lambda path: (len(path), path)))))
    gains = np.array([gain(template, accuracy) for template in templates])
    return tuple(
        PromptTree(template, hung_prompts(end_chances(template, accuracy), gains, room, copies, pruning))
        for template in templates
    )


def prompt_trees(accuracy: Accuracy, nodes: int, copies: int = 1, pruning: Pruning = "likely") -> Trees:
    """Returns the trees that emit most tokens per step.

    Args:
        accuracy: chances by offset and rank; K are the offsets.
        nodes: rows of a pass at most, row 0 apart: guesses and prompt tokens.
        copies: rows of a prompt token.
        pruning: see `hung_prompts`; with `none` all prompt tokens hang on every guess, and there are as many guesses as
            have room.

    Returns:
        A tree per state, 0 to K; trees of row 0 alone, without prompt tokens, where no guess has room.
    """
    depth = len(accuracy)
    room = nodes - depth * copies
    if pruning == "none":
        room //= 1 + depth * copies
    if room < 1:
        return (PromptTree(_NOTHING, (0,)),) * (depth + 1)
    tries = np.unique(np.geomspace(1, room, _TRIES).round().astype(int)).tolist()
    if pruning == "none":
        return trees_of(accuracy, (room,) * depth, room, copies, pruning)
    guesses = [tries[len(tries) // 2]] * depth
    best = trees_of(accuracy, guesses, room, copies, pruning)
    score, before = per_step(best, accuracy)[0], 0.0
    while score > before + 1e-9:
        before = score
        for state in range(depth):
            for count in tries:
                trial = [*guesses[:state], count, *guesses[state + 1 :]]
                trees = trees_of(accuracy, trial, room, copies, pruning)
                found = per_step(trees, accuracy)[0]
                if found > score + 1e-12:
                    best, score, guesses = trees, found, trial
    return best


@functools.lru_cache(maxsize=64)
def sized_trees(accuracy: Accuracy, nodes: int, copies: int, pruning: Pruning, latency: LatencyCurve | None) -> Trees:
    """Returns `prompt_trees` of at most `nodes`; with a latency curve, of the size that emits most tokens per second,
    each step taking as long as its own tree's rows do, or trees of row 0 alone where plain decoding does.
    """
    if latency is None:
        return prompt_trees(accuracy, nodes, copies, pruning)
    best, fastest = prompt_trees(accuracy, 0), MARGIN / latency.seconds[0]
    for rows in sorted({min(size, nodes + 1) for size in latency.sizes} - {1}):
        trees = prompt_trees(accuracy, rows - 1, copies, pruning)
        tokens, shares = per_step(trees, accuracy)
        seconds = shares @ latency.of_steps(np.array([tree.rows(copies) for tree in trees]))
        if tokens / seconds > fastest:
            best, fastest = trees, tokens / seconds
    return best


def by_state(trees: Trees) -> StateTrees:
    """Returns the trees as accept lengths are simulated with (`finetune.head_figures`)."""
    return StateTrees(tuple(tree.template for tree in trees), tuple(np.array(tree.prompts, np.int64) for tree in trees))
