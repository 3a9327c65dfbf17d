"""Prompt tokens: where they stand, what they see, how trees carry them; the contract tests have losslessness, and
`tests/finetune/test_draft_heads.py` that decoding accepts what training simulates.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.speculative.draft_head import Reading, scores
from decoding.speculative.ppd import PPD_HEAD, PPDConfig, PPDOptions, tables_of
from decoding.speculative.prompt_trees import prompt_trees
from decoding.speculative.sizing import LatencyCurve
from models.decoder import Decoder
from models.errors import InputError
from tests.conftest import tiny_config
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts

CONFIG = PPDConfig()
ACCURACY = tuple((0.5 / (k + 1),) + (0.08,) * 5 for k in range(3))


@pytest.fixture(scope="module")
def reading() -> Reading:
    """A row with two texts and padding; the middle layer's window is shorter than the first text."""
    tokens = np.random.default_rng(3).integers(0, 61, 16)
    tokens[14:] = 0
    positions = jnp.asarray([[*range(10), *range(4), 0, 1]])
    segments = jnp.asarray([[1] * 10 + [2] * 4 + [0] * 2])
    return Reading(jnp.asarray(tokens[None]), positions, segments, {})


@pytest.fixture(scope="module")
def guesses(tiny):
    """(config, values, reading) -> f32[B, M, K, D]."""
    return jax.jit(lambda config, values, reading: PPD_HEAD.guesses(config, *tiny, values, reading), static_argnums=0)


def random_prompts(config, scale=1.0):
    shape = (config.offsets, config.copies, 32)
    return {"prompts": scale * jax.random.normal(jax.random.key(config.copies), shape)}


def test_with_the_tokens_to_come_logits_are_the_texts_own(tiny, reading, guesses):
    """The oracle: prompt tokens that are the embeddings of what follows a place."""
    model, params = tiny
    for place, first in ((2, 0), (6, 0), (10, 10)):
        ahead = reading.tokens[0, place + 1 : place + 4]
        values = {"prompts": model.apply({"params": params}, ahead[None], ahead[None], method="embed")[0][:, None]}
        found = guesses(CONFIG, values, reading._replace(places=jnp.asarray([[place]])))
        text = reading.tokens[:, first : place + 4]
        expected = model.apply({"params": params}, text).logits[0, -3:]
        np.testing.assert_allclose(scores(model, params, found[0, 0]), expected, rtol=2e-4, atol=2e-3)


def test_places_are_a_part_of_all(reading, guesses):
    values, places = random_prompts(CONFIG), [9, 3, -1, 11]
    every = guesses(CONFIG, values, reading)
    some = guesses(CONFIG, values, reading._replace(places=jnp.asarray([places])))
    assert every.shape == (1, 16, 3, 32)
    for index in (0, 1, 3):
        np.testing.assert_allclose(some[0, index], every[0, places[index]], rtol=1e-4, atol=1e-4)


def test_copies_see_their_own_kind_alone(reading, guesses):
    """The guess of two copies is the mean of what each guesses by itself; with equal copies that of one."""
    two = PPDConfig(copies=2)
    values = random_prompts(two)
    both = guesses(two, values, reading)
    alone = [guesses(CONFIG, {"prompts": values["prompts"][:, e : e + 1]}, reading) for e in range(2)]
    np.testing.assert_allclose(both[:, :14], ((alone[0] + alone[1]) / 2)[:, :14], rtol=1e-4, atol=1e-4)
    equal = guesses(two, {"prompts": jnp.repeat(values["prompts"][:, :1], 2, axis=1)}, reading)
    np.testing.assert_allclose(equal[:, :14], alone[0][:, :14], rtol=1e-4, atol=1e-4)


def test_an_offset_depends_on_the_prompt_tokens_up_to_it(reading, guesses):
    values = random_prompts(CONFIG)
    moved = {"prompts": values["prompts"].at[1].add(1.0)}
    before, after = (np.asarray(guesses(CONFIG, v, reading))[0, :14] for v in (values, moved))
    assert (np.abs(before - after).max(axis=(0, 2)) > 1e-3).tolist() == [False, True, True]


@pytest.mark.parametrize(("config", "count"), [(CONFIG, 1728), (PPDConfig(offsets=4, copies=8), 4 * 8 * 576)])
def test_trained_numbers(config, count):
    """Three prompt tokens on a model of the default one's width."""
    model = Decoder(dataclasses.replace(tiny_config(), width=576, vocab_size=49152))
    params = {"embedding": {"embedding": jax.ShapeDtypeStruct((576, 49152), jnp.float32)}}
    key = jax.eval_shape(lambda: jax.random.key(0))
    fresh = jax.eval_shape(lambda params, key: PPD_HEAD.init(config, model, params, key), params, key)
    assert [x.shape for x in jax.tree.leaves(fresh)] == [(config.offsets, config.copies, 576)]
    assert sum(x.size for x in jax.tree.leaves(fresh)) == count


def test_trained_numbers_of_the_default_model(smollm2):
    values = PPD_HEAD.init(CONFIG, smollm2.model, smollm2.params, jax.random.key(0))
    assert values["prompts"].size == 3 * 576
    sizes = np.linalg.norm(values["prompts"], axis=-1) / np.sqrt(576)
    assert ((sizes > 0.05) & (sizes < 0.3)).all(), "as embeddings are"


def test_fresh_prompts_are_embeddings(tiny):
    model, params = tiny
    values = PPD_HEAD.init(PPDConfig(copies=2), model, params, jax.random.key(0))
    table = params["embedding"]["embedding"].T
    for row in values["prompts"].reshape(-1, 32):
        assert np.abs(np.asarray(table)[:6] - row[None]).max(axis=1).min() == 0


@pytest.mark.parametrize("copies", [1, 2])
def test_tables_by_brute_force(copies):
    trees = prompt_trees(ACCURACY, 20, copies)
    tables = tables_of(trees, copies, 6)
    assert len({tree.rows(copies) for tree in trees}) > 1
    for state, tree in enumerate(trees):
        row = {(path, 0, 0): index for index, path in enumerate(tree.template.paths)}  # (path, prompt tokens, copy)
        for node, (path, count) in enumerate(zip(tree.template.paths, tree.prompts, strict=True)):
            assert tables.left[state, node] == count
            for number in range(count * copies):
                row[path, number // copies + 1, number % copies] = tables.hung[state, node, number]
        assert sorted(row.values()) == list(range(tree.rows(copies)))
        for (path, prompt, copy), index in row.items():
            above = {index}
            above |= {row[path, before, copy] for before in range(1, prompt)}
            above |= {row[path[:depth], 0, 0] for depth in range(len(path) + 1)}
            assert set(np.flatnonzero(tables.ancestors[state, index])) == above
            assert tables.depth[state, index] == len(path) + prompt
            if prompt:
                assert tables.slot[state, index] == -1 - ((prompt - 1) * copies + copy)
            elif path:
                assert tables.slot[state, index] == (len(path) - 1) * 6 + path[-1]
            parents = {(0, 0): -1} if not path else {}
            parent = parents.get((prompt, len(path)), -2)
            if parent == -2:
                parent = row[path, prompt - 1, copy if prompt > 1 else 0] if prompt else row[path[:-1], 0, 0]
            assert tables.parent[state, index] == parent < index
        dead = np.arange(tables.parent.shape[1]) >= tree.rows(copies)
        assert (tables.parent[state, dead] == -1).all() and (tables.slot[state, dead] == 0).all()


@pytest.mark.parametrize(
    "settings", [{"nodes": 14, "head": PPDConfig(offsets=2, copies=2)}, {"nodes": 12, "pruning": "none"}]
)
def test_text_is_greedy_whatever_the_prompts(tiny, settings):
    model, params = tiny
    fn = make_decode_fn(model, "ppd", max_new_tokens=ROOM, accuracy=ACCURACY, **settings)
    values = random_prompts(settings.get("head", CONFIG))
    output = fn(WithDraft(params, values), PROMPTS)
    assert texts(output) == greedy_texts(model, params, PROMPTS, ROOM)
    assert int(output.stats.drafted.sum()) > 8 * ROOM / 2 and int(output.stats.draft_calls.sum()) == 0


def test_typical_acceptance_keeps_no_row_of_a_prompt(tiny):
    """At temperature 0 it is greedy decoding; above it steps are fewer, and all tokens are of the vocabulary."""
    model, params = tiny
    fn = make_decode_fn(model, "ppd", max_new_tokens=12, nodes=12, acceptance="typical", epsilon=0.02)
    both = WithDraft(params, random_prompts(CONFIG))
    cold, warm = fn(both, PROMPTS), fn(both, PROMPTS, temperature=3.0)
    assert fn.label == "lossy" and texts(cold) == greedy_texts(model, params, PROMPTS, 12)
    assert texts(warm) != texts(cold) and int(warm.stats.accepted.sum()) > int(cold.stats.accepted.sum())
    assert (np.asarray(warm.tokens) >= 0).all()


def test_trees_that_never_pay_are_plain_decoding(tiny):
    model, params = tiny
    fn = make_decode_fn(model, "ppd", max_new_tokens=6, latency=LatencyCurve((1, 4, 16), (1.0, 9.0, 30.0)))
    output = fn(WithDraft(params, random_prompts(CONFIG)), PROMPTS[:2])
    assert texts(output) == greedy_texts(model, params, PROMPTS[:2], 6)
    assert output.stats.steps.tolist() == [6, 6] and output.stats.drafted.tolist() == [0, 0]


def test_errors(tiny):
    model, params = tiny
    for bad in ({"offsets": 0}, {"copies": 0}):
        with pytest.raises(InputError, match="offsets and copies must be at least 1"):
            PPDConfig(**bad)
    with pytest.raises(InputError, match="nodes must be at least 4: 3 prompt tokens in 1 copies .* got 3"):
        PPDOptions(nodes=3)
    with pytest.raises(InputError, match="the head has 3 offsets: offsets must be 1 to that, got 4"):
        PPDOptions(offsets=4)
    with pytest.raises(InputError, match="accuracy covers 2 offsets, but the tree may be 3 deep"):
        PPDOptions(accuracy=ACCURACY[:2])
    with pytest.raises(InputError, match="head must be a PPDConfig"):
        PPDOptions(head=None)
    fn = make_decode_fn(model, "ppd", max_new_tokens=4)
    with pytest.raises(InputError, match="the head's values do not fit its settings .*offsets=3"):
        fn(WithDraft(params, random_prompts(PPDConfig(offsets=2))), [[1, 2]])
