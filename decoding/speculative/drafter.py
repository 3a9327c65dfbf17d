"""What a drafter is to the loop: a triple of pure functions, as an optimiser is a pair.

Axis letters: B batch, W tree rows, A tokens that one step emits at most, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import struct

from decoding.method import Call
from decoding.prefill import Observer, Prompts
from decoding.speculative.target import Verified
from decoding.speculative.tree import TokenTree
from decoding.speculative.verify import Mode
from models.cache import KVCache


@struct.dataclass
class Round:
    """What a drafter may look at when it proposes.

    Attributes:
        last: i32[B], the newest token, row 0 of the tree.
        keys: one random key per row, for this step and the drafter alone.
        call: what the user set for this call.
        seen: bool[B, V], tokens that occur in prompt or output.
        done: bool[B], rows that have ended.
        cache: the target's, with every token but the newest; to be read, never to be written.
    """

    last: jax.Array
    keys: jax.Array
    call: Call
    seen: jax.Array
    done: jax.Array
    cache: KVCache


@struct.dataclass
class Seen:
    """What a drafter may learn from a step.

    Attributes:
        tree: what it proposed.
        digest: what `Drafter.digest` made of the target's pass; zeros for rows that the target did not read.
        verified: what was kept.
        emitted: i32[B], tokens that were added to the output: `verified.tokens` up to here. Fewer than were verified
            where a row ended, 0 for rows that are done.
    """

    tree: TokenTree
    digest: Any
    verified: Verified
    emitted: jax.Array


SIZES = (1, 4, 8, 16, 32)  # of passes, where a drafter's trees vary in size


def sizes_below(width: int) -> tuple[int, ...]:
    """Returns the usual numbers of rows below a tree's width, for `Drafter.smaller`."""
    return tuple(size for size in SIZES if size < width)


class Drafter(NamedTuple):
    """A drafter made for one model.

    Attributes:
        width: W.
        most: A, one more than the deepest row's depth.
        mode: how its trees are verified when a row samples (greedy rows need none): see `verify`.
        init: (params, prompts, slots, call) -> draft state; `params` is all that the user passed, here and below,
            `prompts` what the drafter is to read, `slots` the cache that a draft model needs for it.
        propose: (params, state, round) -> (tree, state, drafted i32[B], draft calls i32[B]).
        observe: (params, state, seen) -> state.
        cold: () -> the state that stays warm between calls, as it is at first; gives None where nothing stays.
        warm: state -> its part that stays warm.
        smaller: rising numbers of rows below W. Where the live rows of all trees fit one of them, the target runs over
            so many rows only; live rows come first then. Each is compiled.
        digest: (logits f32[B, X, V], hidden {i: [B, X, D]}) -> arrays [B, X, ...]: what `observe` is to know of the
            target's pass over the first X rows, accepted or not; by default nothing.
        collect: the residual streams that `digest` sees, by the index of the layer they enter (`Output.hidden`).
        observer: what it wants to see of the prompts while the target reads them; `init` finds that in `Prompts.seen`.
        embed: (params, tree) -> [B, W, D], what its rows without a token carry (`TokenTree`); None: all have one.
    """

    width: int
    most: int
    mode: Mode
    init: Callable[[Any, Prompts, int, Call], Any]
    propose: Callable[[Any, Any, Round], tuple[TokenTree, Any, jax.Array, jax.Array]]
    observe: Callable[[Any, Any, Seen], Any]
    cold: Callable[[], Any] = lambda: None
    warm: Callable[[Any], Any] = lambda state: None
    smaller: tuple[int, ...] = ()
    digest: Callable[[jax.Array, dict[int, jax.Array]], Any] = lambda logits, hidden: None
    collect: tuple[int, ...] = ()
    observer: Observer | None = None
    embed: Callable[[Any, TokenTree], jax.Array] | None = None
