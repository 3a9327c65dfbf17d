"""Chains that end by a stop rule: their lengths, what they cost, and that no rule changes a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, WithHead, make_decode_fn
from decoding.speculative import specdec_pp
from decoding.speculative.specdec_pp import log_bound
from models.acceptance_head import AcceptanceHead
from models.errors import InputError
from tests.support.decode_reference import (
    PROMPTS,
    ROOM,
    chi_squared_p,
    forward,
    greedy_texts,
    noisy,
    row_seeds,
    small_law_model,
    softmax,
    texts,
)

LONGEST = 4
SHORT = [[2, 0, 3], [1], [4, 4, 0, 1, 2]]


def constant_head(width: int, accept: float) -> dict:
    """A head that says the same of every token, with log-odds `accept`."""
    head = AcceptanceHead().init(jax.random.key(0), jnp.zeros((1, width)))["params"]
    head = jax.tree.map(jnp.zeros_like, head)
    return {**head, "out": {**head["out"], "bias": jnp.array([0.0, accept])}}


def random_head(width: int, seed: int = 3) -> dict:
    """A head whose word changes from token to token."""
    head = AcceptanceHead().init(jax.random.key(seed), jnp.zeros((1, width)))["params"]
    return jax.tree.map(lambda x: 9.0 * x, head)


SURE = constant_head(32, 1e4)


def made(tiny, **options):
    return make_decode_fn(tiny[0], "specdec_pp", max_new_tokens=ROOM, draft=tiny[0], **{"longest": LONGEST, **options})


def steps_taken(fn, params, num: int, prompts=PROMPTS, **settings):
    """Returns the stats after `num` steps that no row's limit has cut."""
    inputs = fn.inputs(prompts, row_seeds(len(prompts)), **settings)
    return jax.tree.map(np.asarray, fn.advance(params, fn.start(params, *inputs), num).stats)


def lengths(head=None, **options) -> list[int]:
    """Returns the tokens that a small model drafts for itself in two steps, per row; any head is of width 8."""
    model, params = small_law_model()
    draft = params if head is None else WithHead(params, head)
    stats = steps_taken(made((model, params), **options), WithDraft(params, draft), 2, SHORT)
    np.testing.assert_array_equal(stats.draft_calls, stats.drafted)
    return stats.drafted.tolist()


def test_a_threshold_of_one_never_stops():
    for head in (constant_head(8, -1e4), random_head(8)):
        assert lengths(head, threshold=1.0) == [2 * LONGEST] * len(SHORT)


def test_a_threshold_of_zero_stops_at_once_unless_the_head_is_sure():
    options = {"threshold": 0.0, "shortest": 3}
    for head in (constant_head(8, -1e4), random_head(8)):
        assert lengths(head, **options) == [2 * 3] * len(SHORT)
    assert lengths(constant_head(8, 1e4), **options) == [2 * LONGEST] * len(SHORT)


def test_the_head_speaks_of_the_token_before():
    """With a chance of a per token, 1 - product is 0, 1 - a, 1 - a * a after the draws of tokens 1, 2, 3."""
    for chance, length in ((1e-9, 2), (0.2, 2), (0.5, 3), (0.6, LONGEST), (1 - 1e-9, LONGEST)):
        head = constant_head(8, np.log(chance / (1 - chance)))
        assert lengths(head, threshold=0.7, shortest=1) == [2 * length] * len(SHORT)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_model_as_its_own_draft_is_always_accepted(tiny, temperature):
    """So its cache must be right after chains of every length, whole ones too: one wrong key would show."""
    model, params = tiny
    fn, settings = made(tiny), {"temperature": temperature}
    whole = steps_taken(fn, WithDraft(params, WithHead(params, SURE)), 4, **settings)
    np.testing.assert_array_equal(whole.emitted, [4 * (LONGEST + 1)] * len(PROMPTS))
    some = steps_taken(fn, WithDraft(params, WithHead(params, random_head(32))), 4, **settings)
    np.testing.assert_array_equal(some.accepted, some.drafted)
    assert len(set(some.drafted.tolist())) > 2, "rows must end their chains at different lengths"
    assert (some.histogram[:, 3:].sum(axis=0) > 0).sum() > 1


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_drafted_token_is_accounted_for(tiny, temperature):
    """Drafted = new + discarded - target calls, as long as no text is cut."""
    fn = made(tiny)
    params = WithDraft(tiny[1], WithHead(noisy(tiny[1], 0.05), random_head(32)))
    stats = steps_taken(fn, params, 4, temperature=temperature)
    discarded = stats.drafted - stats.accepted
    assert (discarded > 0).any() and (stats.accepted > 0).any()
    np.testing.assert_array_equal(stats.drafted, stats.emitted + discarded - stats.target_calls)


@pytest.mark.parametrize("stop", ["head", "entropy"])
def test_no_head_changes_greedy_text(tiny, stop):
    model, params = tiny
    plain = greedy_texts(model, params, PROMPTS, ROOM)
    wrong = {**params, "final_norm": jax.tree.map(jnp.negative, params["final_norm"])}
    heads = [random_head(32, 4), SURE, constant_head(32, -1e4)] if stop == "head" else [None]
    fn = made(tiny, stop=stop)
    for draft in (noisy(params, 0.05), wrong):
        for head in heads:
            both = WithDraft(params, draft if head is None else WithHead(draft, head))
            state = fn.advance(both, fn.start(both, *fn.inputs(PROMPTS)))
            assert texts(fn.output(state)) == plain
            if stop == "head":
                assert texts(fn(both, PROMPTS[2:3])) == plain[2:3]


def test_a_token_may_not_be_dropped_for_what_it_is(monkeypatch):
    """Chains that end before a token that was looked at no longer follow the target's law; those of the method do."""
    model, params = small_law_model()
    law = softmax(np.asarray(forward(model, params, np.array([SHORT[0]], np.int32)), np.float64)[0, -1])
    both = WithDraft(params, WithHead(noisy(params, 0.1), random_head(8)))

    def chance(threshold: float) -> float:
        options = {"draft": model, "longest": 2, "shortest": 1, "threshold": threshold}
        fn = make_decode_fn(model, "specdec_pp", max_new_tokens=1, **options)
        return chi_squared_p(np.asarray(fn(both, SHORT[:1] * 40_000, temperature=1.0).tokens)[:, 0], law)

    assert chance(0.7) > 1e-3
    whole = specdec_pp.with_next

    def dropping(so_far, logits, log_read, round_, step, *settings):
        after = whole(so_far, logits, log_read, round_, step, *settings)
        disliked = so_far.going & (after.tokens[:, step + 1] == int(law.argmax()))
        return after.replace(length=jnp.where(disliked, so_far.length, after.length), going=after.going & ~disliked)

    monkeypatch.setattr(specdec_pp, "with_next", dropping)
    assert chance(0.71) < 1e-6, "another threshold: another compilation"


def test_a_drafted_stop_token_ends_the_chain(tiny):
    model, params = tiny
    plain = greedy_texts(model, params, PROMPTS, ROOM)
    stop = plain[0][1]  # the second token of the first chain
    fn = made(tiny, stop_tokens=[stop])
    both = WithDraft(params, WithHead(params, SURE))
    output = fn(both, PROMPTS)
    assert texts(output) == [text[: text.index(stop) + 1] if stop in text else text for text in plain]
    stats = jax.tree.map(np.asarray, output.stats)
    assert (stats.steps[0], stats.drafted[0], stats.accepted[0], stats.emitted[0]) == (1, 2, 2, 2)
    assert stats.drafted.max() > 2, "rows without the token draft on"


def test_the_entropys_bound():
    """Certain laws are accepted for sure; a uniform one over n tokens with 1 - sqrt(0.2 ln n)."""
    laws = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25] * 4])
    expected = 1 - np.sqrt(0.2 * np.log([1, 2, 4]))
    np.testing.assert_allclose(np.exp(log_bound(laws)), expected, rtol=1e-5)
    assert np.exp(log_bound(jnp.full((1, 256), 1 / 256)))[0] == 0
    assert lengths(stop="entropy", threshold=0.0, shortest=1) == [2] * len(SHORT)


def test_params_of_the_wrong_kind(tiny):
    params = tiny[1]
    for stop, given, message in (
        ("head", params, r"takes WithDraft\(target, WithHead\(draft, head\)\)"),
        ("entropy", WithHead(params, SURE), "without a head"),
    ):
        with pytest.raises(InputError, match=message):
            made(tiny, stop=stop)(WithDraft(params, given), PROMPTS)
    with pytest.raises(InputError, match="takes WithDraft"):
        made(tiny)(params, PROMPTS)


def test_options_that_cannot_be(tiny):
    for options, message in (
        ({"stop": "entropi"}, "Did you mean 'entropy'"),
        ({"threshold": 1.5}, "threshold is a probability"),
        ({"shortest": 0}, "shortest must be at least 1"),
        ({"shortest": 5}, "longest at least shortest"),
    ):
        with pytest.raises(InputError, match=message):
            made(tiny, **options)
