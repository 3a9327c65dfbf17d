"""Greedy decoding and sampling against whole forward passes without a cache, batched and row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from tests.support.decode_reference import (
    LENGTHS,
    PROMPTS,
    ROOM,
    greedy_texts,
    keys_data,
    row_seeds,
    small_law_model,
    texts,
)

SETTINGS = {
    "temperature": [1.0, 0.7, 1.3, 2.0, 0.0, 0.5, 1.0, 1.0],
    "top_k": [0, 0, 5, 40, 0, 0, 3, 100],
    "top_p": [1.0, 0.9, 1.0, 0.5, 1.0, 1.0, 0.8, 1.0],
    "min_p": [0.0, 0.0, 0.1, 0.0, 0.0, 0.05, 0.0, 1.0],
    "repetition_penalty": [1.0, 1.3, 1.0, 1.0, 1.0, 0.8, 1.0, 1.0],
}


@pytest.fixture(scope="module")
def expected(tiny) -> list[list[int]]:
    return greedy_texts(*tiny, PROMPTS, ROOM)


@pytest.fixture(scope="module")
def greedy(tiny):
    return make_decode_fn(tiny[0], "greedy", max_new_tokens=ROOM)


@pytest.fixture(scope="module")
def sample(tiny):
    return make_decode_fn(tiny[0], "sample", max_new_tokens=ROOM)


def test_reference_text_is_varied(expected):
    """Equal texts would prove little if every row said the same or one token over and over."""
    assert len({tuple(text) for text in expected}) == len(expected)
    assert min(len(set(text)) for text in expected) > 4


def test_ragged_greedy_batch_equals_whole_forward_passes(tiny, greedy, expected):
    assert texts(greedy(tiny[1], PROMPTS)) == expected


def test_each_greedy_row_alone_equals_whole_forward_passes(tiny, greedy, expected):
    for prompt, text in zip(PROMPTS, expected, strict=True):
        assert texts(greedy(tiny[1], [prompt])) == [text]


def test_a_longer_neighbour_changes_no_text(tiny, greedy, expected):
    """The batch moves to the next bucket and gets a larger cache."""
    longer = np.random.default_rng(5).integers(0, 61, 17).tolist()
    prompts = [*PROMPTS[:-1], longer]
    assert texts(greedy(tiny[1], prompts)) == [*expected[:-1], *greedy_texts(*tiny, [longer], ROOM)]


def test_greedy_ignores_the_seed(tiny, greedy, expected):
    assert texts(greedy(tiny[1], PROMPTS, 99)) == expected


def test_stop_token_ends_a_row_even_as_its_very_first(tiny, expected):
    first = expected[0][0]
    inside = next(token for token in expected[1][2:] if token not in expected[1][:2])
    output = make_decode_fn(tiny[0], max_new_tokens=ROOM, stop_tokens=(first, inside))(tiny[1], PROMPTS)
    stopped = [_until(text, {first, inside}) for text in expected]
    lengths = {len(text) for text in stopped}
    assert 1 in lengths and any(1 < length < ROOM for length in lengths), "choose other stop tokens"
    assert texts(output) == stopped
    np.testing.assert_array_equal(output.stats.steps, [len(text) for text in stopped])


def _until(text: list[int], stops: set[int]) -> list[int]:
    for index, token in enumerate(text):
        if token in stops:
            return text[: index + 1]
    return text


@pytest.mark.parametrize("slots", [16, 12])
def test_full_cache_ends_rows(tiny, expected, slots):
    """The newest token never enters the cache, so a prompt of n tokens leaves room for slots - n + 1."""
    chosen = [row for row in range(len(PROMPTS)) if LENGTHS[row] <= slots]
    fn = make_decode_fn(tiny[0], max_new_tokens=ROOM, cache_slots=slots)
    output = fn(tiny[1], [PROMPTS[row] for row in chosen])
    fits = [slots - LENGTHS[row] + 1 for row in chosen]
    assert max(fits) < ROOM and min(fits) == 1
    assert texts(output) == [expected[row][:fit] for row, fit in zip(chosen, fits, strict=True)]
    np.testing.assert_array_equal(output.stats.steps, fits)


def test_sampled_rows_with_seeds_of_their_own_equal_rows_alone(tiny, sample):
    together = texts(sample(tiny[1], PROMPTS, row_seeds(), **SETTINGS))
    assert len({tuple(text) for text in together}) == len(together)
    for row, seed in enumerate(row_seeds()):
        settings = {name: values[row] for name, values in SETTINGS.items()}
        assert texts(sample(tiny[1], [PROMPTS[row]], [seed], **settings)) == [together[row]], row
    rows = list(range(len(PROMPTS)))[::-1]
    settings = {name: values[::-1] for name, values in SETTINGS.items()}
    turned = sample(tiny[1], [PROMPTS[row] for row in rows], row_seeds()[::-1], **settings)
    assert texts(turned) == together[::-1]


def test_scalar_seed_is_folded_with_the_row(tiny, sample):
    key = jax.random.key(7)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(PROMPTS)))
    by_seed = texts(sample(tiny[1], PROMPTS, 7))
    assert by_seed == texts(sample(tiny[1], PROMPTS, key)) == texts(sample(tiny[1], PROMPTS, keys))
    assert by_seed != texts(sample(tiny[1], PROMPTS, 8))
    assert texts(sample(tiny[1], [PROMPTS[3]], keys[3:4])) == [by_seed[3]]
    same = texts(sample(tiny[1], [PROMPTS[3]] * len(PROMPTS), 7))
    assert len({tuple(text) for text in same}) == len(same)


def test_row_seeds_and_row_keys_are_the_same_thing(sample):
    keys = jnp.stack([jax.random.key(seed) for seed in (3, 4)])
    by_seed, by_key = sample.inputs([[1], [2]], [3, 4])[1], sample.inputs([[1], [2]], keys)[1]
    listed = sample.inputs([[1], [2]], np.array([3, 4]))[1]
    np.testing.assert_array_equal(keys_data(by_seed.keys), keys_data(by_key.keys))
    np.testing.assert_array_equal(keys_data(by_seed.keys), keys_data(listed.keys))


def test_a_list_of_keys_is_one_key_per_row(sample):
    keys = [jax.random.key(seed) for seed in (3, 4)]
    np.testing.assert_array_equal(
        keys_data(sample.inputs([[1], [2]], keys)[1].keys), keys_data(sample.inputs([[1], [2]], [3, 4])[1].keys)
    )


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 0.0, "top_p": 0.3, "min_p": 0.5}, {"top_k": 1}, {"top_p": 1e-6}]
)
def test_settings_that_leave_one_token_give_greedy_text(tiny, sample, expected, settings):
    assert texts(sample(tiny[1], PROMPTS, 3, **settings)) == expected


def test_repetition_penalty_equals_whole_forward_passes(tiny, sample, expected):
    slow = greedy_texts(*tiny, PROMPTS, ROOM, penalty=1.5)
    assert sum(text != plain for text, plain in zip(slow, expected, strict=True)) == len(slow)
    assert texts(sample(tiny[1], PROMPTS, temperature=0.0, repetition_penalty=1.5)) == slow


def test_repetition_penalty_does_not_see_the_padding():
    """Token 0 fills the padding of short rows; it must not count as seen there."""
    model, params = small_law_model()
    fn = make_decode_fn(model, "sample", max_new_tokens=ROOM)
    prompts = [[3], [0, 3], [1, 2, 4, 4], *([[2]] * 5)]
    seen = fn.start(params, *fn.inputs(prompts)).carry.seen
    assert [np.flatnonzero(row).tolist() for row in np.asarray(seen)] == [sorted(set(prompt)) for prompt in prompts]


def test_first_of_equal_tokens_is_taken_at_temperature_zero_as_by_greedy():
    model, params = small_law_model()
    level = {**params, "unembedding": jax.tree.map(jnp.zeros_like, params["unembedding"])}
    prompts = [[3]] * len(PROMPTS)
    zeros = [[0] * ROOM] * len(PROMPTS)
    assert texts(make_decode_fn(model, "greedy", max_new_tokens=ROOM)(level, prompts)) == zeros
    assert texts(make_decode_fn(model, "sample", max_new_tokens=ROOM)(level, prompts, temperature=0.0)) == zeros
