"""EAGLE's layer: its start, what its rows see, and a cache that is always one of true features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, prefill
from decoding.method import Call
from decoding.plan import Plan, start
from decoding.prefill import hidden_observer, observed_prefill, pad_prompts
from decoding.sampling import Sampling
from decoding.speculative import level_head
from decoding.speculative.draft_head import Reading, normed
from decoding.speculative.eagle import EAGLE_HEAD, EagleConfig, EagleOptions, Layer, eagle_head
from decoding.speculative.head_kinds import HEADS
from decoding.speculative.level_head import read_prompts
from models.errors import InputError
from tests.support.decode_reference import PROMPTS

LAST = 3


def values_of(tiny, scale: float):
    fresh = EAGLE_HEAD.init(EagleConfig(), *tiny, jax.random.key(1))
    return jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


def reading_of(tiny, text) -> Reading:
    model, params = tiny
    tokens = jnp.asarray([text])
    hidden = model.apply({"params": params}, tokens, collect=(LAST,)).hidden
    return Reading(tokens, jnp.arange(len(text))[None], jnp.ones_like(tokens), hidden)


def test_a_fresh_layer_is_the_identity(tiny):
    model, params = tiny
    values, reading = values_of(tiny, 0.0), reading_of(tiny, PROMPTS[2])
    found = EAGLE_HEAD.guesses(EagleConfig(), model, params, values, reading)
    f = normed(model, params, reading.hidden[LAST])
    expected = f
    for offset in range(4):
        expected = Layer(model).enter(params, values, jnp.roll(reading.tokens, -1 - offset, axis=1), expected)
        np.testing.assert_allclose(found[0, :12, offset], expected[0, :12], rtol=1e-4, atol=1e-4)
    sizes = [jnp.sqrt(jnp.mean(jnp.square(x))) for x in (params["embedding"]["embedding"] * values["scale"][:, None],)]
    assert float(sizes[0]) == pytest.approx(2.0, rel=1e-4)


def test_guesses_see_nothing_that_is_not_known_yet(tiny):
    """Guess k from place t reads tokens up to t + 1 + k and features up to t."""
    model, params = tiny
    values, reading = values_of(tiny, 0.1), reading_of(tiny, PROMPTS[2])
    place, config = 6, EagleConfig(offsets=3)
    before = EAGLE_HEAD.guesses(config, model, params, values, reading)[0, place]
    for changed in range(4, 12):
        tokens = reading.tokens.at[0, changed].set((reading.tokens[0, changed] + 7) % 61)
        after = EAGLE_HEAD.guesses(config, model, params, values, reading._replace(tokens=tokens))[0, place]
        moved = (np.abs(before - after).max(axis=-1) > 1e-5).tolist()
        assert moved == [changed <= place + 1 + offset for offset in range(3)]
    later = reading.hidden[LAST].at[0, place + 1 :].add(1.0)
    after = EAGLE_HEAD.guesses(config, model, params, values, reading._replace(hidden={LAST: later}))[0, place]
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)


def read(tiny, both, prompts, slots: int):
    """`read_prompts` behind the prefill that it looks on."""
    model, params = tiny
    seen = observed_prefill(model, params, prompts, slots, observer=hidden_observer(model.config.width))[1]
    return read_prompts(eagle_head(model), model, both, prompts.replace(seen=seen), slots)


def test_prompts_read_in_pieces_leave_the_same_cache(tiny, monkeypatch):
    both = WithDraft(tiny[1], values_of(tiny, 0.1))
    prompts = pad_prompts([PROMPTS[2], PROMPTS[4], [5]], 61)
    whole = read(tiny, both, prompts, 32)
    monkeypatch.setattr(level_head, "CHUNK", 4)
    monkeypatch.setattr(prefill, "CHUNK", 8)
    pieces = read(tiny, both, prompts, 32)
    assert whole.cache.length.tolist() == [15, 8, 0]
    np.testing.assert_allclose(whole.last, pieces.last, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(whole.cache.k[0][0, :, :15], pieces.cache.k[0][0, :, :15], rtol=1e-4, atol=1e-4)


def test_the_cache_is_one_of_true_features_after_every_step(tiny):
    """Rows after some steps equal those of the whole text read anew as a prompt."""
    model, params = tiny
    both = WithDraft(params, values_of(tiny, 0.1))
    plan = Plan(model, "eagle", EagleOptions(nodes=30), 24, (), None)
    prompts, zeros = pad_prompts(PROMPTS, 61), jnp.zeros(8)
    settings = Sampling(zeros, jnp.zeros(8, jnp.int32), zeros + 1, zeros, zeros + 1)
    call = Call(jnp.full(8, 24), jax.vmap(jax.random.key)(jnp.arange(8)), settings)
    steps = plan.steps()
    state = jax.jit(start, static_argnums=0)(plan, both, prompts, call)
    step = jax.jit(steps.step)
    for _ in range(8):
        state = step(both, state)
    assert int(state.stats.accepted.sum()) > 0, "or no row of a guess was ever in the way"
    written = zip(PROMPTS, state.tokens.tolist(), state.lengths.tolist(), strict=True)
    texts = [prompt + tokens[:length] for prompt, tokens, length in written]
    assert max(state.lengths.tolist()) < 24, "or a row is done, and what follows its last step means nothing"
    anew = read(tiny, both, pad_prompts(texts, 61), 64)
    own = state.carry.draft
    assert own.cache.length.tolist() == anew.cache.length.tolist() == [len(text) - 1 for text in texts]
    for row, text in enumerate(texts):
        kept = slice(0, len(text) - 1)
        for ours, theirs in ((own.cache.k, anew.cache.k), (own.cache.v, anew.cache.v)):
            np.testing.assert_allclose(ours[0][row, :, kept], theirs[0][row, :, kept], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(own.last, anew.last, rtol=1e-3, atol=1e-3)


def test_settings():
    with pytest.raises(InputError, match="offsets must be at least 1"):
        EagleConfig(offsets=0)
    assert all(kind.config().type == name for name, kind in HEADS.items())
