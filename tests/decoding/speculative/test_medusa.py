"""Medusa's heads and what every head on the target must keep to; the contract tests have losslessness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.sampling import top_tokens
from decoding.speculative.draft_head import Reading, check_values, normed, scores
from decoding.speculative.medusa import MEDUSA_HEAD, MedusaConfig, MedusaHeads
from decoding.speculative.sizing import LatencyCurve, with_drafting
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts

FORMS = ("block", "mlp")


def head_of(tiny, **settings):
    """(settings, fresh values) of heads on the tiny model."""
    model, params = tiny
    config = MedusaConfig(**settings)
    return config, MEDUSA_HEAD.init(config, model, params, jax.random.key(1))


@pytest.mark.parametrize("form", FORMS)
def test_fresh_heads_rank_as_the_model_itself(tiny, form):
    model, params = tiny
    config, values = head_of(tiny, form=form, offsets=4)
    tokens = jnp.asarray([PROMPTS[2]])
    output = model.apply({"params": params}, tokens, collect=(3,))
    reading = Reading(tokens, jnp.arange(16)[None], jnp.ones_like(tokens), output.hidden)
    guesses = MEDUSA_HEAD.guesses(config, model, params, values, reading)
    assert guesses.shape == (1, 16, 4, 32) and guesses.dtype == jnp.float32
    for offset in range(4):
        logits = scores(model, params, guesses[:, :, offset])
        np.testing.assert_allclose(logits, output.logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_each_offset_has_weights_of_its_own(form):
    config = MedusaConfig(offsets=2, form=form)
    f = jax.random.normal(jax.random.key(0), (5, 8))
    values = MedusaHeads(config).init(jax.random.key(1), f)["params"]
    counts = {"block": 2 * (8 * 8 + 8), "mlp": 2 * (8 * 16 + 16 + 16 * 8)}
    assert sum(x.size for x in jax.tree.leaves(values)) == counts[form]
    values = jax.tree.map(lambda x: x + 0.3, values)
    moved = jax.tree.map(lambda x: x.at[1].add(0.1), values)
    before, after = (np.asarray(MedusaHeads(config).apply({"params": v}, f)) for v in (values, moved))
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert np.abs(before[:, 1] - after[:, 1]).max() > 1e-3
    one = f @ values["kernel"][0] + values["bias"][0][None]
    expected = f + (jax.nn.silu(one) if form == "block" else jax.nn.silu(one) @ values["out"][0])
    np.testing.assert_allclose(before[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_drafts_are_what_the_heads_guess(tiny):
    """By hand: with a chain of two, every step emits 1 + the leading guesses that greedy text confirms."""
    model, params = tiny
    config, values = head_of(tiny, offsets=2)
    values = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), values)
    prompt = PROMPTS[4]
    text = greedy_texts(model, params, [prompt], ROOM)[0]
    whole = jnp.asarray([prompt + text])
    stream = model.apply({"params": params}, whole, collect=(3,)).hidden[3]
    guesses = MedusaHeads(config).apply({"params": values}, normed(model, params, stream))
    best = np.asarray(top_tokens(scores(model, params, guesses), 1))[0, :, :, 0]
    place, histogram = 1, [1]  # the first step is a plain one
    while place < ROOM:
        known = len(prompt) + place - 1  # the newest token's place; the pass before it ended one place earlier
        right = [offset for offset in range(2) if best[known - 1, offset] == ([*text, *[-1] * 3])[place + offset]]
        taken = min({(): 0, (0,): 1, (0, 1): 2}.get(tuple(right), 0) + 1, ROOM - place)
        histogram.append(taken)
        place += taken
    fn = make_decode_fn(
        model, "medusa", max_new_tokens=ROOM, head=config, accuracy=((0.9,) + (0.0,) * 9, (0.9,) + (0.0,) * 9), nodes=2
    )
    output = fn(WithDraft(params, values), [prompt])
    assert texts(output) == [text]
    assert output.stats.histogram[0].tolist() == [histogram.count(n) for n in range(4)]
    assert int(output.stats.drafted[0]) == 2 * (len(histogram) - 1)


@pytest.mark.parametrize(
    "curve", [LatencyCurve((1, 4, 16), (1.0, 9.0, 30.0)), LatencyCurve((1, 4, 16), (1.0, 1.0, 1.0), drafting=50.0)]
)
def test_a_tree_that_never_pays_is_plain_decoding(tiny, curve):
    model, params = tiny
    config, values = head_of(tiny)
    fn = make_decode_fn(model, "medusa", max_new_tokens=6, head=config, latency=curve)
    output = fn(WithDraft(params, values), PROMPTS[:2])
    assert texts(output) == greedy_texts(model, params, PROMPTS[:2], 6)
    assert output.stats.steps.tolist() == [6, 6] and output.stats.drafted.tolist() == [0, 0]


def test_drafting_is_what_steps_take_beyond_their_pass(tiny):
    model, params = tiny
    config, values = head_of(tiny)
    fn = make_decode_fn(model, "medusa", max_new_tokens=16, head=config, nodes=3)
    for seconds, drafts in ((1e-9, True), (100.0, False)):
        curve = LatencyCurve((1, 4), (seconds, seconds))
        found = with_drafting(curve, fn, WithDraft(params, values), context=8, repeats=2)
        assert found.seconds == curve.seconds and 0 <= found.drafting < 10 and (found.drafting > 0) == drafts
    with pytest.raises(InputError, match="drafting must be 0 or more"):
        LatencyCurve((1, 4), (1.0, 1.0), drafting=-1.0)


def test_errors(tiny):
    model, params = tiny
    config, values = head_of(tiny, offsets=2)
    check_values(MEDUSA_HEAD, config, model, WithDraft(params, values))
    fn = make_decode_fn(model, "medusa", max_new_tokens=4)  # of three offsets
    with pytest.raises(InputError, match="the head's values do not fit its settings .*offsets=3"):
        fn(WithDraft(params, values), [[1, 2]])
    with pytest.raises(InputError, match=r"takes WithDraft\(target, head\), with a trained head"):
        fn(params, [[1, 2]])
    with pytest.raises(InputError, match="unknown option"):
        make_decode_fn(model, "medusa", offset=2)
