"""A chain from a draft model: what it costs, what is accepted, and what the draft's cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_model_as_its_own_draft_is_always_accepted(tiny, temperature):
    """So its cache must be right after every kind of step, whole chains too: one wrong key would show."""
    model, params = tiny
    fn = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model, length=3)
    stats = fn(WithDraft(params, params), PROMPTS, 1, temperature=temperature).stats
    np.testing.assert_array_equal(stats.steps, [ROOM // 4] * len(PROMPTS))
    np.testing.assert_array_equal(stats.accepted, [ROOM * 3 // 4] * len(PROMPTS))
    np.testing.assert_array_equal(stats.draft_calls, stats.steps * 3)


def test_a_draft_that_is_never_right_costs_no_text(tiny):
    model, params = tiny
    wrong = {**params, "final_norm": jax.tree.map(jnp.negative, params["final_norm"])}  # likes what the target dislikes
    fn = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model, length=3)
    output = fn(WithDraft(params, wrong), PROMPTS)
    assert texts(output) == greedy_texts(model, params, PROMPTS, ROOM)
    assert (np.asarray(output.stats.accepted) == 0).all() and (np.asarray(output.stats.steps) == ROOM).all()


def test_stop_tokens_inside_an_accepted_chain(tiny):
    model, params = tiny
    plain = greedy_texts(model, params, PROMPTS, ROOM)
    stop = plain[0][5]
    fn = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model, stop_tokens=[stop])
    expected = [text[: text.index(stop) + 1] if stop in text else text for text in plain]
    output = fn(WithDraft(params, params), PROMPTS)
    assert texts(output) == expected
    limit = [3, 24, 1, 0, 7, 9, 2, 5]
    output = fn(WithDraft(params, params), PROMPTS, max_new_tokens=limit)
    assert texts(output) == [text[:n] for text, n in zip(expected, limit, strict=True)]


def test_options_that_cannot_be(tiny):
    for options, message in (({"length": 0}, "length must be"), ({"draft_temperature": -1.0}, "draft_temperature")):
        with pytest.raises(InputError, match=message):
            make_decode_fn(tiny[0], "speculative_sampling", draft=tiny[0], **options)
