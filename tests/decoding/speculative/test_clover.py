"""Clover's heads: what they start as, what they know, what their ablations leave, and what may enter their trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.speculative.clover import CLOVER_HEAD, CloverConfig, CloverOptions, attention_decoder
from decoding.speculative.draft_head import Reading, normed, scores
from decoding.speculative.medusa import MEDUSA_HEAD, MedusaConfig
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts

LAST, WIDTH = 3, 32
PLAIN = CloverConfig()
WITHOUT = {
    "nothing": PLAIN,
    "decoder": CloverConfig(decoder=False),
    "connection": CloverConfig(decoder=False, connection=False),
    "block": CloverConfig(decoder=False, connection=False, block=False),
    "clover_2": CloverConfig(version=2),
}


def values_of(tiny, config, scale: float = 0.1):
    fresh = CLOVER_HEAD.init(config, *tiny, jax.random.key(1))
    return jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@pytest.fixture(scope="module")
def reading(tiny) -> Reading:
    model, params = tiny
    tokens = jnp.asarray([PROMPTS[2]])
    hidden = model.apply({"params": params}, tokens, collect=(LAST,)).hidden
    return Reading(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens), hidden)


def guesses(tiny, config, values, reading):
    return CLOVER_HEAD.guesses(config, *tiny, values, reading)


@pytest.mark.parametrize("config", WITHOUT.values(), ids=WITHOUT)
def test_fresh_heads_rank_as_the_model_itself(tiny, reading, config):
    model, params = tiny
    found = guesses(tiny, config, values_of(tiny, config, 0.0), reading)
    f = normed(model, params, reading.hidden[LAST])
    assert found.shape == (1, 16, config.offsets, WIDTH) and found.dtype == jnp.float32
    if config.version == 1:
        np.testing.assert_allclose(found, jnp.broadcast_to(f[:, :, None], found.shape), rtol=1e-4, atol=1e-4)
    ours, theirs = scores(model, params, found), scores(model, params, f)[:, :, None]
    np.testing.assert_array_equal(jnp.argmax(ours, axis=-1), jnp.broadcast_to(jnp.argmax(theirs, -1), ours.shape[:3]))


def test_parameters_are_those_of_the_formula(tiny):
    """d wide, K heads, a layer of the target: 2 norms, attention of 4 query and 2 key heads, a gated MLP of 48."""
    d, k = WIDTH, 3
    layer = 2 * d + 2 * d * d + 2 * d * 16 + 3 * d * 48
    decoder, concat, heads = d + 3 * d * d, d + 2 * d * d + d, k * (d * d + d)
    expected = {
        "nothing": layer + decoder + heads,
        "decoder": layer + concat + heads,
        "connection": layer + heads,
        "block": heads,
        "clover_2": 2 * layer + 2 * (decoder + 3 * d) + d + 1 + 3 * d * d + 2 * d,
    }
    for name, config in WITHOUT.items():
        values = jax.eval_shape(lambda config=config: CLOVER_HEAD.init(config, *tiny, jax.random.key(0)))
        assert sum(x.size for x in jax.tree.leaves(values)) == expected[name], name
        parts = {"block": config.block, "decoder": config.decoder, "concat": not config.decoder and config.connection}
        assert {part for part in parts if part in values} == {part for part, there in parts.items() if there}


def test_without_all_three_it_is_medusa(tiny, reading):
    config = WITHOUT["block"]
    values = values_of(tiny, config)
    medusa = MedusaConfig(offsets=3, form="block")
    theirs = MEDUSA_HEAD.init(medusa, *tiny, jax.random.key(0))
    assert jax.tree.map(jnp.shape, values["heads"]) == jax.tree.map(jnp.shape, theirs) and set(values) == {"heads"}
    expected = MEDUSA_HEAD.guesses(medusa, *tiny, values["heads"], reading)
    np.testing.assert_allclose(guesses(tiny, config, values, reading), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", WITHOUT.values(), ids=WITHOUT)
def test_guesses_see_nothing_that_is_not_known_yet(tiny, reading, config):
    """Guess k from place t reads tokens t + 1 to t + 1 + k, where it reads any, and streams up to t."""
    values, place = values_of(tiny, config), 6
    look = jax.jit(lambda reading: guesses(tiny, config, values, reading)[0, place])
    before = look(reading)

    def moved(changed: Reading) -> list[bool]:
        return (np.abs(before - look(changed)).max(axis=-1) > 1e-5).tolist()

    for changed in range(4, 12):
        tokens = reading.tokens.at[0, changed].set((reading.tokens[0, changed] + 7) % 61)
        reads = [config.connection and changed <= place + 1 + offset for offset in range(config.offsets)]
        reads = [read and (changed > place or config.version == 2) for read in reads]
        assert moved(reading._replace(tokens=tokens)) == reads, changed
    for changed, seen in ((place - 2, config.block), (place, True), (place + 1, False)):
        stream = reading.hidden[LAST].at[0, changed].add(jnp.cos(jnp.arange(WIDTH, dtype=jnp.float32)))
        assert moved(reading._replace(hidden={LAST: stream})) == [seen] * config.offsets


@pytest.mark.parametrize("bias", [False, True])
def test_the_attention_decoder_weighs_each_head_with_a_cosine(bias):
    keys = jax.random.split(jax.random.key(0), 7)
    d, heads = 12, 3
    values = {name: jax.random.normal(key, (d, d)) for name, key in zip("qkv", keys, strict=False)}
    values["norm"] = 1.0 + 0.2 * jax.random.normal(keys[3], (d,))
    if bias:
        values["bias"] = jax.random.normal(keys[4], (3, d))
    h, e = jax.random.normal(keys[5], (5, d)), jax.random.normal(keys[6], (5, d))
    out = np.asarray(attention_decoder(values, heads, h, e))
    add = np.asarray(values.get("bias", jnp.zeros((3, d))))
    for row in range(5):
        x = np.asarray(h[row] / np.sqrt(np.mean(np.square(h[row])) + 1e-6) * values["norm"])
        q, k, v = (
            np.asarray(y @ values[n]) + add[i] for i, (y, n) in enumerate(((x, "q"), (e[row], "k"), (e[row], "v")))
        )
        for part in (slice(4 * head, 4 * head + 4) for head in range(heads)):
            cosine = q[part] @ k[part] / np.linalg.norm(q[part]) / np.linalg.norm(k[part])
            assert -1 <= cosine <= 1
            np.testing.assert_allclose(out[row, part], h[row, part] + cosine * v[part], rtol=1e-3, atol=1e-3)


def test_a_vector_of_zeros_has_no_direction_and_no_nan():
    values = {name: jnp.eye(4) for name in "qkv"} | {"norm": jnp.ones(4)}
    h = jnp.ones((1, 4))
    value, grad = jax.value_and_grad(lambda e: attention_decoder(values, 2, h, e).sum())(jnp.zeros((1, 4)))
    assert float(value) == 4.0 and bool(jnp.isfinite(grad).all())


def test_children_enter_until_the_mass_is_reached():
    law = -np.sort(-np.random.default_rng(0).dirichlet([0.4] * 8, 200).astype(np.float32), axis=1)[None]
    options = CloverOptions(mass=0.7, share=0.2)
    found = np.asarray(options.keep(jnp.log(jnp.asarray(law))))[0]
    counts = set()
    for chances, kept in zip(law[0], found, strict=True):
        expected, total = [], 0.0
        for chance in chances:
            expected.append(bool(total <= 0.7 and chance >= 0.2 * chances[0]))
            total += float(chance)
        if min(abs(total_ - 0.7) for total_ in np.cumsum(chances)) > 1e-4:
            assert kept.tolist() == expected
        counts.add(int(kept.sum()))
    assert found[:, 0].all() and len(counts) > 2
    assert np.asarray(CloverOptions(mass=1.0, share=0.0).keep(jnp.log(jnp.asarray(law)))).mean() > 0.95


@pytest.mark.parametrize("name", ["clover_2", "block"])
def test_texts_are_greedy_ones(tiny, name):
    """The contract tests have Clover; these are the heads with most layers, and with none at all."""
    config = WITHOUT[name]
    fn = make_decode_fn(tiny[0], "clover", max_new_tokens=ROOM, head=config, nodes=5)
    both = WithDraft(tiny[1], values_of(tiny, config))
    output, expected = fn(both, PROMPTS), greedy_texts(*tiny, PROMPTS, ROOM)
    assert texts(output) == expected and int(output.stats.accepted.sum()) > 8
    assert (output.stats.drafted <= 5 * output.stats.steps).all()
    if config.version == 2:
        assert texts(fn(both, [PROMPTS[0]])) == [expected[0]]


def test_settings_out_of_range(tiny):
    for settings, words in (
        ({"offsets": 0}, "offsets must be at least 1"),
        ({"version": 3}, "version must be 1 or 2, got 3"),
        ({"connection": False}, "without connection set decoder to false"),
        ({"version": 2, "block": False}, "left out of version 1 alone"),
    ):
        with pytest.raises(InputError, match=words):
            CloverConfig(**settings)
    for settings in ({"mass": 0.0}, {"mass": 1.1}, {"share": -0.1}, {"share": 1.1}):
        with pytest.raises(InputError, match="mass must be above 0 and share from 0"):
            CloverOptions(**settings)
    fn = make_decode_fn(tiny[0], "clover", max_new_tokens=2)
    with pytest.raises(InputError, match="the head's values do not fit its settings"):
        fn(WithDraft(tiny[1], values_of(tiny, WITHOUT["block"])), [[1, 2]])
