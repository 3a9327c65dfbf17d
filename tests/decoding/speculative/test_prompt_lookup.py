"""Prompt lookup: the search against a slow loop, and copies that the target accepts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.speculative.prompt_lookup import Text, look_up
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts
from tests.support.toy_law import cyclic_model

jitted_look_up = jax.jit(look_up, static_argnums=(1, 2))


def slow_look_up(text: list[int], length: int, longest: int) -> list[int]:
    """Returns what followed the latest earlier place of the longest n-gram that ends the text, over and over."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                behind = text[start + n :]
                return [behind[i % len(behind)] for i in range(length)]
    return []


@pytest.mark.parametrize(("length", "longest"), [(7, 3), (1, 1), (3, 5), (4, 2), (30, 3)])
@pytest.mark.parametrize("alphabet", [1, 2, 3, 8])
def test_look_up_equals_a_slow_loop(alphabet, length, longest):
    rng = np.random.default_rng(alphabet)
    rows = [rng.integers(0, alphabet, rng.integers(1, 25)).tolist() for _ in range(64)] + [[0], [0, 0]]
    tokens = rng.integers(0, alphabet, (len(rows), 24), dtype=np.int32)  # what stands behind a row is not zeros
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    copied, found = jitted_look_up(Text(jnp.asarray(tokens), jnp.asarray(lengths)), length, longest)
    assert copied.shape == (len(rows), length) and copied.dtype == jnp.int32
    drafts = [row.tolist() if hit else [] for row, hit in zip(np.asarray(copied), np.asarray(found), strict=True)]
    assert drafts == [slow_look_up(row, length, longest) for row in rows]


@pytest.mark.parametrize(
    ("text", "copied"),
    [
        ([1, 2, 3, 4, 9, 2, 3], [4, 9, 2]),
        ([5, 3, 1, 2, 3, 7, 2, 3], [7, 2, 3]),  # two tokens in place beat one nearer
        ([2, 3, 8, 8, 2, 3, 9, 9, 2, 3], [9, 9, 2]),  # of two places the latest
        ([1, 2, 3], []),
        ([4], []),
        ([4, 4], [4, 4, 4]),  # a loop goes on
        ([6, 1, 2, 1, 2], [1, 2, 1]),
    ],
)
def test_what_is_copied(text, copied):
    tokens, found = look_up(Text(jnp.asarray([text], jnp.int32), jnp.asarray([len(text)])), 3, 3)
    assert (tokens[0].tolist() if found[0] else []) == copied


def test_options_that_cannot_be(tiny):
    for options in ({"length": 0}, {"longest": 0}, {"length": -2}):
        with pytest.raises(InputError, match="length and longest must be at least 1, got"):
            make_decode_fn(tiny[0], "prompt_lookup", **options)
    with pytest.raises(InputError, match="unknown option of method 'prompt_lookup' 'lenght'"):
        make_decode_fn(tiny[0], "prompt_lookup", lenght=3)


def test_copies_of_what_the_model_says_next_are_accepted():
    """A model that goes round in a cycle longer than a copy; one prompt holds a whole round of it, one does not."""
    model, params = cyclic_model()
    cycle = [5 * place % 12 for place in range(13)]
    fn = make_decode_fn(model, "prompt_lookup", max_new_tokens=32, length=7)
    output = fn(params, [cycle, cycle[:3]])
    assert texts(output) == [[(5 * (13 + n)) % 12 for n in range(32)], [(5 * (3 + n)) % 12 for n in range(32)]]
    assert output.stats.steps.tolist() == [32 // 8, (13 - 3) + 22 // 8 + 1]
    assert output.stats.histogram[0].tolist() == [0] * 8 + [4]
    assert output.stats.accepted.tolist()[0] == output.stats.drafted.tolist()[0] == 28
    assert output.stats.draft_calls.tolist() == [0, 0] and output.warm is None


def test_nothing_to_copy_takes_one_step_per_token():
    model, params = cyclic_model()
    output = make_decode_fn(model, "prompt_lookup", max_new_tokens=32, length=7)(params, [[0], [1]], max_new_tokens=9)
    assert output.stats.steps.tolist() == [9, 9] and output.stats.drafted.tolist() == [0, 0]


def test_text_is_greedy_text_with_other_options(tiny):
    model, params = tiny
    fn = make_decode_fn(model, "prompt_lookup", max_new_tokens=ROOM, length=12, longest=1)
    assert texts(fn(params, PROMPTS)) == greedy_texts(model, params, PROMPTS, ROOM)
