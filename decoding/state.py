"""What every decoding method carries through its loop, and the one function that adds tokens to it.

Between steps this holds: `cache` has every token of the row but the newest, `last` is that newest token. A step runs
the target on `last` (and whatever a method drafts behind it), and `emit`s at least one token per unfinished row.

Axis letters: B batch, N room for new tokens, A tokens that one step offers per row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.cache import KVCache


@struct.dataclass
class DecodeStats:
    """Counts per row, i32[B] unless said otherwise; every method counts the same things.

    Attributes:
        steps: loop steps that the row took part in.
        emitted: new tokens, stop token included.
        drafted: tokens proposed to the target.
        accepted: proposed tokens that were emitted.
        target_calls: forward passes of the target model after the prompt.
        draft_calls: forward passes of a draft model after the prompt.
        histogram: i32[B, A + 1]; entry n counts the steps that emitted n tokens.
    """

    steps: jax.Array
    emitted: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    target_calls: jax.Array
    draft_calls: jax.Array
    histogram: jax.Array


@struct.dataclass
class Hypotheses:
    """The texts that a search has found for each row, best first; n of them.

    Attributes:
        tokens: i32[B, n, N], new tokens; 0 from `lengths` on.
        lengths: i32[B, n], stop token included; 0 where there is no such text.
        scores: f32[B, n], what they are ranked by: `log_probs` over length ** length_penalty; -inf where there is none.
        log_probs: f32[B, n], log-probabilities of the texts behind the prompt.
        token_log_probs: f32[B, n, N], those of the single tokens, 0 from `lengths` on; None where not asked for.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    log_probs: jax.Array
    token_log_probs: jax.Array | None = None


def to_room(x: jax.Array, room: int) -> jax.Array:
    """Returns [..., N] with `room` entries on its last axis, of any number of them: cut, or zeros behind."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, max(0, room - x.shape[-1]))])[..., :room]


@struct.dataclass
class DecodeOutput:
    """What a decode function returns.

    Attributes:
        tokens: i32[B, N], new tokens; 0 from `lengths` on.
        lengths: i32[B], new tokens per row, stop token included.
        stats: counts per row.
        warm: what the method learned and may start from in the next call (`decode_fn(..., warm=output.warm)`), or None.
        found: all texts of a method that searches, the first of which is `tokens`; or None.
    """

    tokens: jax.Array
    lengths: jax.Array
    stats: DecodeStats
    warm: Any = None
    found: Hypotheses | None = None


@struct.dataclass
class DecodeState:
    """The loop's state.

    Attributes:
        cache: every token of each row except `last`.
        last: i32[B], each row's newest token.
        tokens: i32[B, N], new tokens so far.
        lengths: i32[B], how many they are.
        limit: i32[B], how many there may be, <= N.
        done: bool[B], rows that met a stop token or their limit.
        stats: counts per row.
        carry: what the method itself keeps (sampling state, draft state).
        kernels: the weights that the method has fitted to the prompts (`decoding.method.Tailor`), or None.
    """

    cache: KVCache
    last: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    limit: jax.Array
    done: jax.Array
    stats: DecodeStats
    carry: Any
    kernels: Any = None


def init_state(cache: KVCache, last: jax.Array, limit: jax.Array, room: int, most: int, carry: Any) -> DecodeState:
    """Returns the state before the first step; `room` is N, `most` is A, `last` (i32[B]) the prompts' last tokens."""
    zero = jnp.zeros_like(limit)
    return DecodeState(
        cache=cache,
        last=last,
        tokens=jnp.zeros((limit.shape[0], room), jnp.int32),
        lengths=zero,
        limit=limit,
        done=limit <= 0,
        stats=DecodeStats(zero, zero, zero, zero, zero, zero, jnp.zeros((limit.shape[0], most + 1), jnp.int32)),
        carry=carry,
    )


def emit(state: DecodeState, tokens: jax.Array, count: jax.Array, stop_tokens: tuple[int, ...]) -> DecodeState:
    """Adds each row's first `count` tokens, cut after a stop token and at the row's limit; counts the step.

    Args:
        state: the state before the step. Rows that are done stay as they are.
        tokens: i32[B, A], the tokens that the step offers, in order.
        count: i32[B], how many of them, 1 to A.
        stop_tokens: ids that end a row; the stop token itself is emitted.

    Returns:
        The state with tokens, lengths, last, done, and the counts `steps`, `emitted` and `target_calls` brought up to
        date.
    """
    offers = jnp.arange(tokens.shape[1])[None, :]
    count = jnp.where(state.done, 0, jnp.minimum(count, state.limit - state.lengths))
    stops = jnp.isin(tokens, jnp.asarray(stop_tokens, jnp.int32)) & (offers < count[:, None])
    stopped = stops.any(axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1) + 1, count)
    newest = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    lengths = state.lengths + count
    active = (~state.done).astype(jnp.int32)
    stats = state.stats.replace(
        steps=state.stats.steps + active,
        emitted=state.stats.emitted + count,
        target_calls=state.stats.target_calls + active,
        histogram=state.stats.histogram.at[jnp.arange(count.shape[0]), count].add(active),
    )
    return state.replace(
        tokens=write_tokens(state.tokens, state.lengths, tokens, count),
        lengths=lengths,
        last=jnp.where(count > 0, newest, state.last),
        done=state.done | stopped | (lengths >= state.limit),
        stats=stats,
    )


def write_tokens(text: jax.Array, lengths: jax.Array, tokens: jax.Array, count: jax.Array) -> jax.Array:
    """Returns text i32[B, N] with each row's first `count` of tokens i32[B, A] at places `lengths` and after."""
    offset = jnp.arange(text.shape[1])[None, :] - lengths[:, None]
    offered = jnp.take_along_axis(tokens, jnp.clip(offset, 0, tokens.shape[1] - 1), axis=1)
    return jnp.where((offset >= 0) & (offset < count[:, None]), offered, text)


def run_if(wanted: jax.Array, run: Callable[[Any], Any], value: Any) -> Any:
    """Returns run(value) where wanted (bool[]), else the value: a loop of one turn, since `lax.cond` copies caches."""
    return jax.lax.while_loop(lambda carry: carry[0], lambda carry: (~wanted, run(carry[1])), (wanted, value))[1]
