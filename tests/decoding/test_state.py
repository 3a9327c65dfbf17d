"""`emit` against a Python loop over rows and tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.state import DecodeState, emit, init_state

BATCH, ROOM, VOCAB, MOST = 48, 9, 12, 5
jitted_emit = jax.jit(emit, static_argnums=3)


@dataclasses.dataclass
class SlowRow:
    """One row, token by token."""

    limit: int
    last: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    done: bool = False
    counts: list[int] = dataclasses.field(default_factory=list)  # tokens emitted by each step

    def emit(self, offered: list[int], stop_tokens: tuple[int, ...]) -> None:
        """Adds tokens until a stop token, the limit or the end of the offer."""
        if self.done:
            return
        self.counts.append(0)
        for token in offered:
            self.tokens.append(token)
            self.last = token
            self.counts[-1] += 1
            self.done = token in stop_tokens or len(self.tokens) == self.limit
            if self.done:
                return


def start(limit: np.ndarray, last: np.ndarray) -> tuple[DecodeState, list[SlowRow]]:
    state = init_state(None, jnp.asarray(last), jnp.asarray(limit), ROOM, MOST, None)
    rows = [SlowRow(int(n), int(token), done=bool(n == 0)) for n, token in zip(limit, last, strict=True)]
    return state, rows


def check(state: DecodeState, rows: list[SlowRow]) -> None:
    tokens = np.zeros((len(rows), ROOM), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row.tokens)] = row.tokens
    np.testing.assert_array_equal(state.tokens, tokens)
    np.testing.assert_array_equal(state.lengths, [len(row.tokens) for row in rows])
    np.testing.assert_array_equal(state.last, [row.last for row in rows])
    np.testing.assert_array_equal(state.done, [row.done for row in rows])
    np.testing.assert_array_equal(state.stats.emitted, [len(row.tokens) for row in rows])
    np.testing.assert_array_equal(state.stats.steps, [len(row.counts) for row in rows])
    np.testing.assert_array_equal(state.stats.target_calls, [len(row.counts) for row in rows])
    histogram = [np.bincount(row.counts, minlength=MOST + 1) for row in rows]
    np.testing.assert_array_equal(state.stats.histogram, histogram)
    for name in ("drafted", "accepted", "draft_calls"):
        np.testing.assert_array_equal(getattr(state.stats, name), np.zeros(len(rows)))


@pytest.mark.parametrize("stop_tokens", [(), (3,), (0, 7)])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_emit_equals_a_loop_over_rows_and_tokens(width, stop_tokens):
    rng = np.random.default_rng(width)
    last = rng.integers(0, VOCAB, BATCH, dtype=np.int32)
    state, rows = start(rng.integers(0, ROOM + 1, BATCH, dtype=np.int32), last)
    check(state, rows)
    for _ in range(ROOM):
        tokens = rng.integers(0, VOCAB, (BATCH, width), dtype=np.int32)
        count = rng.integers(1, width + 1, BATCH, dtype=np.int32)
        state = jitted_emit(state, jnp.asarray(tokens), jnp.asarray(count), stop_tokens)
        for row, offered, n in zip(rows, tokens, count, strict=True):
            row.emit(offered[:n].tolist(), stop_tokens)
        check(state, rows)
    assert state.done.all()


def emit_one_row(tokens: list[int], count: int, stop_tokens: tuple[int, ...] = (), limit: int = ROOM) -> DecodeState:
    state, _ = start(np.array([limit], np.int32), np.array([1], np.int32))
    return jitted_emit(state, jnp.asarray([tokens], jnp.int32), jnp.asarray([count], jnp.int32), stop_tokens)


def test_stop_token_inside_the_block_ends_the_row_and_is_emitted():
    state = emit_one_row([4, 5, 6, 5], 4, stop_tokens=(5,))
    assert state.tokens[0].tolist() == [4, 5] + [0] * (ROOM - 2)
    assert bool(state.done[0]) and int(state.last[0]) == 5


def test_stop_token_behind_the_count_is_not_seen():
    state = emit_one_row([4, 6, 5], 2, stop_tokens=(5,))
    assert int(state.lengths[0]) == 2 and not bool(state.done[0])


def test_stop_token_behind_the_limit_is_not_seen():
    state = emit_one_row([4, 6, 5], 3, stop_tokens=(5,), limit=2)
    assert state.tokens[0, :3].tolist() == [4, 6, 0] and bool(state.done[0])


def test_row_with_limit_zero_is_done_before_the_first_step():
    state, _ = start(np.array([0, 2], np.int32), np.array([7, 8], np.int32))
    assert state.done.tolist() == [True, False]
    state = jitted_emit(state, jnp.asarray([[4], [5]], jnp.int32), jnp.ones((2,), jnp.int32), (4,))
    assert state.lengths.tolist() == [0, 1] and state.last.tolist() == [7, 5]
    assert state.stats.steps.tolist() == [0, 1] and state.tokens[0].tolist() == [0] * ROOM


def test_emit_keeps_what_it_does_not_own():
    state, _ = start(np.array([3], np.int32), np.array([7], np.int32))
    carry = {"table": jnp.arange(3)}
    state = state.replace(carry=carry, stats=state.stats.replace(drafted=jnp.asarray([5], jnp.int32)))
    after = jitted_emit(state, jnp.asarray([[2, 2]], jnp.int32), jnp.full((1,), 2), ())
    np.testing.assert_array_equal(after.carry["table"], carry["table"])
    assert after.stats.drafted.tolist() == [5] and after.stats.accepted.tolist() == [0]
