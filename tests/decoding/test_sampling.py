"""`process_logits` against sorting in numpy, the law of `draw`, and the keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sampling import _BLOCK, Sampling, draw, process_logits, row_keys, step_keys
from tests.support.decode_reference import chi_squared_p, filtered, keys_data, penalised, softmax

DRAWS = 40_000
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
jitted, jitted_draw = jax.jit(process_logits), jax.jit(draw)


def sampling(rows: list[dict]) -> Sampling:
    columns = {name: [row.get(name, default) for row in rows] for name, default in OFF.items()}
    dtypes = {name: jnp.int32 if name == "top_k" else jnp.float32 for name in OFF}
    return Sampling(**{name: jnp.asarray(values, dtypes[name]) for name, values in columns.items()})


def process(logits: np.ndarray, rows: list[dict], seen: np.ndarray | None = None) -> np.ndarray:
    seen = np.zeros(logits.shape, bool) if seen is None else seen
    return np.asarray(jitted(jnp.asarray(logits, jnp.float32), sampling(rows), jnp.asarray(seen)))


def law(logits: np.ndarray) -> np.ndarray:
    return np.stack([softmax(row.astype(np.float64)) for row in logits])


def check(logits: np.ndarray, rows: list[dict], seen: np.ndarray) -> int:
    """Compares with the reference; returns how many rows were compared (the others lie too close to a limit)."""
    out, compared = process(logits, rows, seen), 0
    for index, settings in enumerate(rows):
        expected, close = filtered(logits[index], set(np.flatnonzero(seen[index]).tolist()), **settings)
        kept = np.isfinite(out[index])
        assert kept.any() and not np.isnan(out[index]).any(), settings
        if not close:
            np.testing.assert_array_equal(kept, np.isfinite(expected), err_msg=str(settings))
            shifted, expected = out[index] - out[index].max(), expected - expected.max()
            np.testing.assert_allclose(shifted[kept], expected[kept], rtol=1e-5, atol=1e-5, err_msg=str(settings))
            compared += 1
    return compared


def random_settings(rng: np.random.Generator, vocab: int) -> dict:
    """Each setting is off half of the time."""
    choices = {
        "temperature": lambda: float(np.float32(rng.choice([0.0, 0.3, 0.7, 2.5]))),
        "top_k": lambda: int(rng.choice([1, 2, 5, vocab, vocab + 9])),
        "top_p": lambda: float(np.float32(rng.uniform(0.05, 0.99))),
        "min_p": lambda: float(np.float32(rng.choice([0.01, 0.1, 0.6, 1.0]))),
        "repetition_penalty": lambda: float(np.float32(rng.choice([0.5, 1.2, 2.0]))),
    }
    return {name: choose() for name, choose in choices.items() if rng.random() < 0.5}


def random_logits(rng: np.random.Generator, kind: str, vocab: int) -> np.ndarray:
    normal = rng.standard_normal(vocab).astype(np.float32)
    return {
        "normal": normal * 3,
        "ties": np.round(normal).astype(np.float32) + np.float32(0.25),
        "peaked": normal * 40,
        "equal": np.full(vocab, -2.5, np.float32),
        "one allowed": np.where(np.arange(vocab) == 3, normal, np.float32(-1e9)),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "ties", "peaked", "equal", "one allowed"])
def test_random_rows_with_settings_of_their_own_equal_the_reference(kind):
    rng = np.random.default_rng(len(kind))
    num_rows, vocab = 96, 23
    compared = 0
    for _ in range(3):
        logits = np.stack([random_logits(rng, kind, vocab) for _ in range(num_rows)])
        settings = [random_settings(rng, vocab) for _ in range(num_rows)]
        compared += check(logits, settings, rng.random((num_rows, vocab)) < 0.3)
    assert compared > 0.9 * 3 * num_rows


def test_nothing_changes_when_everything_is_off():
    logits = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)
    np.testing.assert_allclose(law(process(logits, [{}, {}], np.ones((2, 7), bool))), law(logits), rtol=1e-5)


def test_top_k_keeps_ties_with_the_kth():
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], np.float32)
    assert np.isfinite(process(logits, [{"top_k": 2}]))[0].tolist() == [False, True, True, True, True, False]


def test_top_p_is_a_nucleus_that_reaches_p():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]] * 4, np.float32))
    kept = np.isfinite(process(logits, [{"top_p": p} for p in (0.1, 0.49, 0.6, 0.8)]))
    assert kept.sum(axis=1).tolist() == [1, 1, 2, 4]  # the last row keeps both of a tie


def test_filters_run_in_the_stated_order():
    law = np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    logits = np.log(law)
    # Top-k first: the two that stay have 0.57 and 0.43, so the first alone reaches 0.5. Top-p first would keep two.
    assert np.isfinite(process(logits, [{"top_k": 2, "top_p": 0.5}])).sum() == 1
    # Temperature first: at 0.25 the first alone has 0.72 of the mass. Top-p first would keep three.
    assert np.isfinite(process(logits, [{"temperature": 0.25, "top_p": 0.7}])).sum() == 1
    # Penalty before everything: the seen favourite falls behind the second.
    out = process(logits + 2, [{"repetition_penalty": 4.0, "top_k": 1}], np.array([[True, False, False, False]]))
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == [1]
    # Penalty before temperature, whose sign does not matter, but top-k and min-p follow temperature.
    assert np.isfinite(process(logits, [{"temperature": 10.0, "min_p": 0.8}])).sum() == 4


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    out = process(np.array([[4.0, -4.0, 4.0, 0.0]]), [{"repetition_penalty": 2.0}], np.array([[1, 1, 0, 1]], bool))
    np.testing.assert_allclose(law(out), law(np.array([[2.0, -8.0, 4.0, 0.0]])), rtol=1e-5)


@pytest.mark.parametrize("others", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.3}, {"top_k": 50, "top_p": 0.5}])
def test_temperature_zero_leaves_the_most_likely_token(others):
    logits = np.random.default_rng(1).standard_normal((8, 11)).astype(np.float32)
    out = process(logits, [{"temperature": 0.0, **others}] * 8)
    np.testing.assert_array_equal(np.isfinite(out), logits == logits.max(axis=1, keepdims=True))
    np.testing.assert_array_equal(np.argmax(out, axis=1), np.argmax(logits, axis=1))


EXTREME_LOGITS = {
    "wide": [[3e4, -3e4, 0.0, 1.0]],
    "large": [[1e6, 9e5, -1e6, 0.0]],
    "tiny": [[1e-30, -1e-30, 0.0, 2e-30]],
    "masked": [[-np.inf, 1.0, -np.inf, 0.5]],
    "zeros": [[0.0, -0.0, 0.0, -0.0]],
}
EXTREME_SETTINGS = [
    {"temperature": 1e-6},
    {"temperature": 1e-37},
    {"temperature": 1e30},
    {"top_p": 1e-30},
    {"top_p": 1e-38},
    {"top_p": 1 - 2**-24},
    {"min_p": 1.0},
    {"min_p": 1e-30},
    {"top_k": 2**31 - 1},
    {"repetition_penalty": 1e-20},
    {"repetition_penalty": 1e20},
    {"temperature": 0.0, "top_k": 1, "top_p": 1e-6, "min_p": 1.0, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("kind", EXTREME_LOGITS)
@pytest.mark.parametrize("settings", EXTREME_SETTINGS, ids=str)
def test_extremes_always_leave_the_most_likely_token_and_never_a_nan(kind, settings):
    logits = np.array(EXTREME_LOGITS[kind], np.float32)
    out = process(logits, [settings], np.array([[True, False, True, False]]))
    scores = penalised(logits[0], {0, 2}, settings.get("repetition_penalty", 1.0))
    assert not np.isnan(out).any() and np.isfinite(out[0, np.argmax(scores)]), out
    assert out[0, np.argmax(scores)] == out.max()


def test_row_does_not_depend_on_its_neighbours_settings():
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((6, 19)).astype(np.float32)
    rows = [{}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.2}, {"temperature": 0.0}, {"repetition_penalty": 1.7}]
    seen = rng.random((6, 19)) < 0.5
    together = process(logits, rows, seen)
    for index, row in enumerate(rows):
        alone = process(logits[index : index + 1], [row], seen[index : index + 1])
        np.testing.assert_array_equal(together[index], alone[0])


LOGITS = np.array([1.5, 0.0, -np.inf, 0.7, -2.0, 1.0, -0.3], np.float32)


def tokens_drawn(logits: np.ndarray, seed: int) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    return np.asarray(jitted_draw(jnp.broadcast_to(jnp.asarray(logits)[None, :], (DRAWS, len(logits))), keys))


def test_draw_follows_the_law():
    tokens = tokens_drawn(LOGITS, 0)
    assert tokens.dtype == np.int32
    assert chi_squared_p(tokens, softmax(LOGITS.astype(np.float64))) > 1e-3


@pytest.mark.parametrize("bug", ["temperature 1.1", "uniform noise", "half precision of the best"])
def test_the_test_of_the_law_catches_a_wrong_law(bug):
    if bug == "temperature 1.1":
        tokens = tokens_drawn(LOGITS / np.float32(1.1), 0)
    elif bug == "uniform noise":
        tokens = np.argmax(LOGITS + np.random.default_rng(0).random((DRAWS, len(LOGITS))), axis=1)
    else:
        tokens = tokens_drawn(np.where(np.arange(7) == 0, LOGITS - np.float32(0.08), LOGITS), 0)
    assert chi_squared_p(tokens, softmax(LOGITS.astype(np.float64))) < 1e-6


def test_draw_follows_the_law_over_a_vocabulary_of_many_blocks():
    vocab = 3 * _BLOCK + 11
    logits = np.random.default_rng(3).standard_normal(vocab).astype(np.float32)
    logits[_BLOCK : 2 * _BLOCK] = -np.inf
    logits[[0, 2 * _BLOCK, vocab - 1]] = [4.0, 5.0, 4.5]
    law = softmax(logits.astype(np.float64))
    tokens = np.concatenate([tokens_drawn(logits, seed) for seed in range(3)])
    assert chi_squared_p(tokens, law) > 1e-3
    assert chi_squared_p(tokens, np.roll(law, 1)) == 0.0


@pytest.mark.parametrize(("uniform", "token"), [(0.0, _BLOCK + 2), (0.5, _BLOCK + 2), (1 - 2**-24, 2 * _BLOCK - 1)])
def test_draw_at_the_ends_of_the_uniform_number_takes_no_impossible_token(monkeypatch, uniform, token):
    """Whole blocks before and behind the three tokens are impossible, and so are their neighbours."""
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(uniform))
    logits = np.full((1, 4 * _BLOCK + 3), -np.inf, np.float32)
    logits[0, [_BLOCK + 2, _BLOCK + 7, 2 * _BLOCK - 1]] = [1.0, -1.0, -2.0]
    assert draw(jnp.asarray(logits), row_keys(jax.random.key(0), 1)).tolist() == [token]


@pytest.mark.parametrize("vocab", [5, _BLOCK, _BLOCK + 1])
def test_draw_from_broken_logits_stays_in_the_vocabulary(vocab):
    token = draw(jnp.full((1, vocab), jnp.nan), row_keys(jax.random.key(0), 1))
    assert 0 <= int(token[0]) < vocab


def test_draw_of_a_row_depends_on_its_key_alone():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((5, 40)), jnp.float32)
    keys = jax.random.split(jax.random.key(9), 5)
    together = jitted_draw(logits, keys)
    for row in range(5):
        assert int(jitted_draw(logits[row : row + 1], keys[row : row + 1])[0]) == int(together[row])


def test_keys_of_rows_and_steps():
    key = jax.random.key(4)
    rows = row_keys(key, 3)
    np.testing.assert_array_equal(keys_data(rows[2]), keys_data(jax.random.fold_in(key, 2)))
    np.testing.assert_array_equal(keys_data(row_keys(rows, 3)), keys_data(rows))
    steps = jnp.asarray([0, 0, 7], jnp.int32)
    np.testing.assert_array_equal(keys_data(step_keys(rows, steps)[2]), keys_data(jax.random.fold_in(rows[2], 7)))


def test_same_seed_same_token_and_other_steps_and_rows_other_tokens():
    flat = jnp.zeros((4, 5000))
    keys = row_keys(jax.random.key(1), 4)

    def tokens(step):
        return jitted_draw(flat, step_keys(keys, jnp.full((4,), step, jnp.int32))).tolist()

    assert tokens(0) == tokens(0)
    drawn = [token for step in range(4) for token in tokens(step)]
    assert len(set(drawn)) == len(drawn)
