"""How good a head is on held-out text: accuracy by offset and rank, the trees that follow from it, accept lengths.

The accept length of a tree is that of greedy decoding over a text that is known: start behind the prompt, go as many
tokens ahead as the tree has right and one more, and so on. Where texts are the target's own greedy ones this is what
decoding with the tree does; sampled texts are harder to guess. Nothing is run for it but the head.

Axis letters: N tokens of all texts, K offsets, R ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from decoding.speculative.head_trees import RANKS, Accuracy, StateTrees, accepted_row, one_state
from decoding.speculative.tree import chain
from finetune.draft_heads import HeadBatch, filled, index_rows
from finetune.packing import Batches
from finetune.rows import Rows
from models.errors import InputError

NODES = (4, 16, 63)  # of the trees whose accept lengths are measured


def all_ranks(
    ranks: Any, params: Any, values: Any, rows: Rows, hidden: Mapping[int, np.ndarray], chosen: np.ndarray, length: int
) -> np.ndarray:
    """Returns i32[N, K]: at which rank the head has the right token, from each token of the chosen rows; else -1.

    Args:
        ranks: of `finetune.draft_heads.make_ranks`.
        params: the target's.
        values: the head's.
        rows: all texts.
        hidden: their streams.
        chosen: numbers of rows.
        length: tokens of a packed row.
    """
    batches = Batches(index_rows(rows, chosen), batch_size=4, length=length)
    found = None
    for step in range(len(batches)):
        batch = batches(step)
        held: HeadBatch = filled(batch, rows, hidden)
        got, wanted = map(np.asarray, ranks(params, values, held))
        if found is None:
            found = np.full((len(rows.tokens), got.shape[-1]), -1, np.int32)
        real = batch.segments[0] > 0
        found[batch.tokens[0][real]] = np.where(wanted, got, -1)[real]
    return found


def accuracy_of(ranks: np.ndarray) -> Accuracy:
    """Returns how often the right token stands at each of the first ranks of each offset, of i32[N, K] (-1: unknown).

    Raises:
        InputError: no text is long enough for an offset.
    """
    rows = []
    for offset, own in enumerate(ranks.T):
        known = own[own >= 0]
        if not len(known):
            raise InputError(f"no text to calibrate on has {offset + 2} tokens: generate longer ones, or more of them")
        rows.append(tuple(float(np.mean(known == rank)) for rank in range(RANKS)))
    return tuple(rows)


def accept_length(trees: StateTrees, ranks: np.ndarray, rows: Rows, chosen: Sequence[int]) -> float:
    """Returns the new tokens per step of trees over the chosen rows; the plain first step of a text is left out.

    Args:
        trees: no deeper than the ranks know.
        ranks: i32[N, K], as `all_ranks` has it.
        rows: all texts.
        chosen: numbers of rows.
    """
    taken_rows = [accepted_row(template, ranks) for template in trees.templates]
    steps = tokens = 0
    for row in chosen:
        start, stop = rows.starts[row], rows.starts[row + 1]
        place = start + int(np.argmax(rows.targets[start:stop]))  # the first token that was written
        state = len(trees.templates) - 1
        while place + 1 < stop:
            last = taken_rows[state][place - 1]
            taken = min(int(trees.templates[state].depth[last]) + 1, stop - 1 - place)
            steps, tokens, place, state = steps + 1, tokens + taken, place + taken, trees.after[state][last]
    if not steps:
        raise InputError("no text to measure on has two tokens: generate longer ones")
    return tokens / steps


def figures_of(
    calibration: np.ndarray,
    test: np.ndarray,
    rows: Rows,
    chosen: tuple[Sequence[int], Sequence[int]],
    trees: Callable[[Accuracy, int], StateTrees],
) -> tuple[Accuracy, dict[str, float]]:
    """Returns the accuracy that trees are made from, and figures.

    Args:
        calibration: i32[N, K], ranks on the texts that decide on trees.
        test: ranks on others, which the figures are of.
        rows: all texts.
        chosen: the rows among them that are calibrated on, and those that are measured on.
        trees: (accuracy, nodes) -> what the head drafts with.

    Returns:
        (accuracy, {top1_k, top10_k: shares at offset k from 1 on; mat_chain, mat_NODES: new tokens per step;
        calibration_mat_16: that of the texts that decided on the trees, which a head can be chosen by}).
    """
    accuracy, held_out = accuracy_of(calibration), accuracy_of(test)
    figures = {f"top1_{k + 1}": own[0] for k, own in enumerate(held_out)}
    figures |= {f"top{RANKS}_{k + 1}": sum(own) for k, own in enumerate(held_out)}
    figures["mat_chain"] = accept_length(one_state(chain(len(accuracy))), test, rows, chosen[1])
    for nodes in NODES:
        figures[f"mat_{nodes}"] = accept_length(trees(accuracy, nodes), test, rows, chosen[1])
    figures["calibration_mat_16"] = accept_length(trees(accuracy, 16), calibration, rows, chosen[0])
    return accuracy, figures
