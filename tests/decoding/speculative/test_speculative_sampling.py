"""A chain from a draft model: what it costs, what is accepted, and what the draft's cache holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from models.decoder import Decoder
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


def test_a_draft_can_read_a_prompt_of_its_own(tiny):
    """The text is the target's; drafts get worse where the draft reads less, and not where it reads the same."""
    model, params = tiny
    fn = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model, length=3)
    both, plain = WithDraft(params, params), greedy_texts(model, params, PROMPTS, ROOM)
    same = fn(both, PROMPTS, draft_prompts=PROMPTS)
    assert texts(same) == plain and (np.asarray(same.stats.steps) == ROOM // 4).all()
    for other in ([prompt[-1:] for prompt in PROMPTS], [[1] * 40 + prompt for prompt in PROMPTS]):
        output = fn(both, PROMPTS, draft_prompts=other)
        assert texts(output) == plain
        assert np.asarray(output.stats.steps).sum() > np.asarray(same.stats.steps).sum()


def test_draft_prompts_that_cannot_be(tiny):
    model, params = tiny
    fn = make_decode_fn(model, "speculative_sampling", max_new_tokens=4, draft=model)
    for prompts, message in (([[1]], "must be 2"), ([[1], []], "prompt 1 is empty"), ([[1] * 4000] * 2, "context is")):
        with pytest.raises(InputError, match=message):
            fn(WithDraft(params, params), [[1], [2]], draft_prompts=prompts)
    with pytest.raises(InputError, match="has no draft model"):
        make_decode_fn(model, "greedy", max_new_tokens=4)(params, [[1]], draft_prompts=[[1]])


def test_a_draft_with_a_shorter_context_ends_the_text(tiny):
    model, params = tiny
    draft = Decoder(dataclasses.replace(model.config, max_length=20))
    fn = make_decode_fn(model, "speculative_sampling", max_new_tokens=8, draft=draft)
    assert fn(WithDraft(params, params), [[1] * 15]).lengths.tolist() == [20 - 15 + 1]
    assert fn(WithDraft(params, params), [[1] * 15], draft_prompts=[[1]]).lengths.tolist() == [8]
    with pytest.raises(InputError, match="the draft model's context only 20"):
        fn(WithDraft(params, params), [[1] * 21])


def test_options_that_cannot_be(tiny):
    for options, message in (({"length": 0}, "length must be"), ({"draft_temperature": -1.0}, "draft_temperature")):
        with pytest.raises(InputError, match=message):
            make_decode_fn(tiny[0], "speculative_sampling", draft=tiny[0], **options)
