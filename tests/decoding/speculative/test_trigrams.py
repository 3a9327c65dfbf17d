"""The table of tri-grams: what it learns and counts against plain dictionaries, and what its fixed size costs."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.speculative.trigrams import Trigrams, count_trigrams, empty_table, learn, look_up, slot_of
from models.errors import InputError

SLOTS, VOCAB = 1 << 15, 8
PAIRS = [(first, second) for first in range(VOCAB) for second in range(VOCAB)]
jitted_learn = jax.jit(learn)


def window(*texts: list[int]) -> jax.Array:
    """Returns i32[B, 16], the texts' ends."""
    return jnp.asarray([([-1] * 16 + text)[-16:] for text in texts], jnp.int32)


def learned(table: Trigrams, *texts: list[int]) -> Trigrams:
    return jitted_learn(table, window(*texts), jnp.ones((len(texts),), bool))


def known(table: Trigrams, pair: tuple[int, int]) -> list[tuple[int, float]]:
    """Returns the successors of a pair, as (token, weight)."""
    tokens, weights = (np.asarray(x).tolist() for x in look_up(table, jnp.asarray(pair)))
    num = sum(weight > 0 for weight in weights)
    assert not any(weights[num:]) and tokens[num:] == [-1] * (len(tokens) - num)
    return list(zip(tokens[:num], weights[:num], strict=True))


def by_weight(successors: dict[int, np.float32]) -> list[tuple[int, float]]:
    return sorted(((token, float(weight)) for token, weight in successors.items()), key=lambda x: (-x[1], x[0]))


def test_the_pairs_of_these_tests_have_slots_of_their_own():
    slots = slot_of(jnp.asarray(PAIRS), SLOTS)
    assert slots.dtype == jnp.int32 and len(set(slots.tolist())) == len(PAIRS)
    many = np.asarray(slot_of(jnp.asarray(np.random.default_rng(0).integers(0, 50_000, (40_000, 2))), 1024))
    counts = np.bincount(many, minlength=1024)
    assert counts.size == 1024 and counts.min() > 10 and counts.max() < 80, "pairs must spread over all slots"


def test_learning_equals_a_dictionary():
    """Ragged texts that grow, rows that have ended, weights that meet the cap; entry for entry."""
    rng = np.random.default_rng(1)
    table = jax.tree.map(jnp.asarray, empty_table(SLOTS, VOCAB))
    texts = [rng.integers(0, 3, length).tolist() for length in (0, 1, 2, 3, 9, 40)]
    slow: dict[tuple, dict[int, np.float32]] = {}
    for step in range(60):
        active = rng.random(len(texts)) < 0.8
        table = jitted_learn(table, window(*texts), jnp.asarray(active))
        for text in (text for text, is_active in zip(texts, active, strict=True) if is_active):
            for first, second, third in zip(text[-16:], text[-16:][1:], text[-16:][2:], strict=False):
                law = slow.setdefault((first, second), {})
                law[third] = min(law.get(third, np.float32(0)) + np.float32(0.04), np.float32(3))
        for text in texts[1:]:
            text += rng.integers(0, 3 if step < 40 else VOCAB, rng.integers(1, 6)).tolist()
    assert {pair: known(table, pair) for pair in PAIRS} == {pair: by_weight(slow.get(pair, {})) for pair in PAIRS}
    weights = [weight for law in slow.values() for weight in law.values()]
    assert max(weights) == 3 and min(weights) < 0.2 and len(weights) > 100


def test_one_update_adds_as_often_as_a_trigram_stands_in_the_window():
    table = learned(empty_table(SLOTS, VOCAB), [1] * 5 + [2, 3] + [1] * 13 + [4, 1])  # six tokens are out of sight
    assert known(table, (1, 1)) == [(1, pytest.approx(0.04 * 11)), (4, pytest.approx(0.04))]
    assert known(table, (1, 4)) == [(1, pytest.approx(0.04))]
    assert known(table, (1, 2)) == known(table, (2, 3)) == [] and known(table, (3, 1)) == [(1, pytest.approx(0.04))]


def test_a_text_of_two_tokens_teaches_nothing():
    empty = empty_table(SLOTS, VOCAB)
    jax.tree.map(np.testing.assert_array_equal, learned(empty, [], [3], [3, 4]), empty)
    jax.tree.map(np.testing.assert_array_equal, jitted_learn(empty, window([1, 2, 3, 4]), jnp.zeros((1,), bool)), empty)


def test_a_newer_pair_drives_out_the_older_one_of_its_slot():
    slots = slot_of(jnp.asarray(PAIRS), 2).tolist()
    old = next(pair for pair, slot in zip(PAIRS, slots, strict=True) if slot == 1)
    new = next(pair for pair, slot in zip(PAIRS, slots, strict=True) if slot == 1 and pair != old)
    table = learned(learned(empty_table(2, VOCAB), [*old, 5]), [*old, 6])
    assert [token for token, _ in known(table, old)] == [5, 6]
    table = learned(table, [*new, 5])
    assert known(table, new) == [(5, pytest.approx(0.04))] and known(table, old) == []


def test_a_full_pair_gives_up_its_lightest_successor():
    table = empty_table(SLOTS, 40)
    for token in [*range(2, 14), *range(2, 8), *range(9, 14)]:  # 8 stays at one update
        table = learned(table, [0, 1, token])
    assert table.tokens.shape == (SLOTS, 12) and known(table, (0, 1))[-1] == (8, pytest.approx(0.04))
    table = learned(table, [0, 1, 30])
    tokens = [token for token, _ in known(table, (0, 1))]
    assert tokens == [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 30]
    assert known(table, (0, 1))[-1][1] == pytest.approx(0.04)


def test_unknown_pairs_have_no_successors():
    table = learned(empty_table(SLOTS, VOCAB), [1, 2, 3])
    tokens, weights = look_up(table, jnp.asarray([[[-1, -1], [-1, 2]], [[2, 1], [1, 2]]]))
    assert tokens.shape == weights.shape == (2, 2, 8)
    assert np.asarray(weights > 0).sum() == 1 and tokens[1, 1, 0] == 3 and (tokens[0] == -1).all()


def test_counting_equals_a_counter():
    rng = np.random.default_rng(2)
    texts = [np.minimum(rng.geometric(0.12, length) - 1, 19).tolist() for length in (0, 1, 2, 3, 4000, 900)]
    table = count_trigrams(texts, 20, slots=1 << 20)
    counts = Counter(tri for text in texts for tri in zip(text, text[1:], text[2:], strict=False))
    longest = 0
    for pair in {(first, second) for first, second, _ in counts}:
        law = {third: count for (first, second, third), count in counts.items() if (first, second) == pair}
        shares = {token: np.float32(count / sum(law.values())) for token, count in law.items()}
        assert known(table, pair) == by_weight(shares)[:12]
        longest = max(longest, len(law))
    assert longest > 12 and (table.pairs[:, 0] >= 0).sum() == len({tri[:2] for tri in counts})
    assert [x.dtype for x in jax.tree.leaves(table)] == [np.int32, np.int32, np.float32]


def test_texts_are_counted_apart():
    table = count_trigrams([[1, 2, 3], [4, 5, 6]], VOCAB)
    assert table.pairs.shape == (65536, 2) and table.tokens.shape == (65536, VOCAB)
    assert {pair: known(table, pair) for pair in PAIRS if known(table, pair)} == {
        (1, 2): [(3, 1.0)],
        (4, 5): [(6, 1.0)],
    }
    jax.tree.map(np.testing.assert_array_equal, count_trigrams([], VOCAB), empty_table(65536, VOCAB))


def test_of_pairs_that_meet_the_most_frequent_one_is_counted():
    slots = slot_of(jnp.asarray(PAIRS), 2).tolist()
    meeting = [pair for pair, slot in zip(PAIRS, slots, strict=True) if slot == 0][:5]
    often = meeting[2]
    texts = [[*pair, 7] for pair in meeting] + [[*often, 6]]
    table = count_trigrams(texts, VOCAB, slots=2)
    assert known(table, often) == [(6, 0.5), (7, 0.5)]
    assert [known(table, pair) for pair in meeting if pair != often] == [[]] * 4


@pytest.mark.parametrize(
    ("texts", "slots", "message"),
    [
        ([[1, 2, 8]], 64, "text 0 has token id 8, but the model has ids 0 to 7: was it encoded with another model's"),
        ([[1], [1, -1, 2]], 64, "text 1 has token id -1"),
        ([["a", "b"]], 64, "text 0 must be a list of token ids, got .* encode it first"),
        ([[1, 2, 3]], 100, "slots must be a power of two, 2 to 16777216, got 100"),
    ],
)
def test_mistakes(texts, slots, message):
    with pytest.raises(InputError, match=message):
        count_trigrams(texts, VOCAB, slots=slots)
