"""Chimera's module: what it starts as, what it knows, what its ablations leave, and that pieces of a text add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.speculative.chimera import CHIMERA_HEAD, ChimeraConfig, Encoders, chimera_head
from decoding.speculative.draft_head import Reading, normed
from models.cache import commit, init_cache
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts

LAST, WIDTH, K = 3, 32, 3
WHOLE = ChimeraConfig(offsets=K)
WITHOUT = {
    "nothing": WHOLE,
    "trigram": ChimeraConfig(offsets=K, trigram=False),
    "context": ChimeraConfig(offsets=K, context=False),
    "residual": ChimeraConfig(offsets=K, residual=False),
}


def values_of(tiny, config, scale: float = 0.1):
    fresh = CHIMERA_HEAD.init(config, *tiny, jax.random.key(1))
    return jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@pytest.fixture(scope="module")
def reading(tiny) -> Reading:
    """One text of 16 tokens."""
    model, params = tiny
    tokens = jnp.asarray([PROMPTS[2]])
    hidden = model.apply({"params": params}, tokens, collect=(LAST,)).hidden
    return Reading(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens), hidden)


def test_a_fresh_module_adds_its_trigram_to_the_state(tiny, reading):
    """The layer passes on what it is given, and Q = [I, I]: y_k = f_t + g_{t+k}, wherever there are three tokens."""
    model, params = tiny
    values, module = values_of(tiny, WHOLE, 0.0), Encoders(WHOLE, model)
    found = CHIMERA_HEAD.guesses(WHOLE, model, params, values, reading)
    f = normed(model, params, reading.hidden[LAST])
    e = module.embedded(params, values, reading.tokens)[0]
    assert found.shape == (1, 16, K, WIDTH) and found.dtype == jnp.float32
    for place in range(2, 16 - K):
        for offset in range(K):
            newest = place + 1 + offset
            g = module.trigram(values, *(e[None, None, newest - back] for back in (2, 1, 0)))[0, 0]
            np.testing.assert_allclose(found[0, place, offset], f[0, place] + g, rtol=1e-4, atol=1e-4)


def test_parameters_are_those_of_the_formula(tiny):
    d, layer = WIDTH, 2 * WIDTH + 2 * WIDTH * WIDTH + 2 * WIDTH * 16 + 3 * WIDTH * 48
    memory = {3: 9 * d * d + 3 * d + 3 * d * d, 1: d * d + d + d * d}
    expected = {
        "nothing": layer + memory[3] + K * 2 * d * d + 1,
        "trigram": layer + memory[1] + K * 2 * d * d + 1,
        "context": layer + memory[3] + K * 2 * d * d + 1,
        "residual": layer + memory[3] + K * d * d + 1,
    }
    for name, config in WITHOUT.items():
        values = jax.eval_shape(lambda config=config: CHIMERA_HEAD.init(config, *tiny, jax.random.key(0)))
        assert sum(x.size for x in jax.tree.leaves(values)) == expected[name], name


@pytest.mark.parametrize("config", WITHOUT.values(), ids=WITHOUT)
def test_guesses_see_what_is_known_and_their_own_path(tiny, reading, config):
    """Guess k from place t reads tokens t - 1 (t + 1 without trigrams) to t + 1 + k, and streams up to t."""
    values, place = values_of(tiny, config), 6
    look = jax.jit(lambda reading: CHIMERA_HEAD.guesses(config, *tiny, values, reading)[0, place])
    before = look(reading)

    def moved(changed: Reading) -> list[bool]:
        return (np.abs(before - look(changed)).max(axis=-1) > 1e-5).tolist()

    for changed in range(4, 12):
        tokens = reading.tokens.at[0, changed].set((reading.tokens[0, changed] + 7) % 61)
        first = place - 1 if config.trigram else place + 1
        reads = [first <= changed <= place + 1 + offset for offset in range(K)]
        assert moved(reading._replace(tokens=tokens)) == reads, changed
    for changed, seen in ((place - 2, config.context), (place, True), (place + 1, False)):
        stream = reading.hidden[LAST].at[0, changed].add(jnp.cos(jnp.arange(WIDTH, dtype=jnp.float32)))
        if changed == place and not config.context and not config.residual:
            seen = False  # nothing reads the target's states any more
        assert moved(reading._replace(hidden={LAST: stream})) == [seen] * K, changed


def test_texts_side_by_side_do_not_see_each_other(tiny, reading):
    values, cut = values_of(tiny, WHOLE), 7
    alone = [
        reading._replace(
            tokens=reading.tokens[:, part],
            positions=reading.positions[:, : reading.tokens[:, part].shape[1]],
            segments=reading.segments[:, part],
            hidden={LAST: reading.hidden[LAST][:, part]},
        )
        for part in (slice(cut), slice(cut, None))
    ]
    packed = reading._replace(
        positions=jnp.concatenate([one.positions for one in alone], axis=1),
        segments=jnp.concatenate([jnp.full_like(one.segments, n) for n, one in enumerate(alone, 1)], axis=1),
    )
    found = CHIMERA_HEAD.guesses(WHOLE, *tiny, values, packed)
    for start, stop, one in ((0, cut - K - 1, alone[0]), (cut, 16, alone[1])):  # what lies ahead may be another text
        expected = CHIMERA_HEAD.guesses(WHOLE, *tiny, values, one)[:, : stop - start]
        np.testing.assert_allclose(found[:, start:stop], expected, rtol=1e-4, atol=1e-4)


def test_a_text_in_pieces_leaves_the_state_of_the_whole(tiny, reading):
    """Read in one pass, or token by token: the same cache and the same states."""
    model, params = tiny
    head, both = chimera_head(model, WHOLE), WithDraft(params, values_of(tiny, WHOLE))
    tokens, stream = reading.tokens[:, 1:9], reading.hidden[LAST][:, :8]
    none = init_cache(head.layers, 1, 32, jnp.float32), jnp.zeros((1, head.width))
    states, cache = head.follow(both, *none, tokens, stream)
    follow = jax.jit(lambda *given: head.follow(both, *given))
    (own, last), found = none, []
    for place in range(8):
        out, own = follow(own, last, tokens[:, place : place + 1], stream[:, place : place + 1])
        own, last = commit(own, None, jnp.ones((1,), jnp.int32)), out[:, -1]
        found.append(out)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), states, rtol=1e-4, atol=1e-4)
    for ours, theirs in ((own.k, cache.k), (own.v, cache.v)):
        np.testing.assert_allclose(ours[0][:, :, :8], theirs[0][:, :, :8], rtol=1e-4, atol=1e-4)
    y = head.reads(both, 0, states, tokens)
    np.testing.assert_allclose(
        y, CHIMERA_HEAD.guesses(WHOLE, *tiny, both.draft, reading)[:, :8, 0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "options"), [("residual", {"nodes": 9}), ("nothing", {"nodes": 9, "tree": "dynamic"})]
)
def test_texts_are_greedy_ones(tiny, name, options):
    config = WITHOUT[name]
    fn = make_decode_fn(tiny[0], "chimera", max_new_tokens=ROOM, head=config, **options)
    output = fn(WithDraft(tiny[1], values_of(tiny, config, 0.03)), PROMPTS)
    assert texts(output) == greedy_texts(*tiny, PROMPTS, ROOM)
    assert (output.stats.drafted <= 9 * output.stats.steps).all()


def test_settings_that_cannot_be(tiny):
    with pytest.raises(InputError, match="offsets must be at least 1, got 0"):
        ChimeraConfig(offsets=0)
    fn = make_decode_fn(tiny[0], "chimera", max_new_tokens=2, head=WHOLE)
    with pytest.raises(InputError, match="the head's values do not fit its settings"):
        fn(WithDraft(tiny[1], values_of(tiny, WITHOUT["residual"])), [[1, 2]])
