"""Recursive speculative decoding: draws without replacement, perturbed beams, and trees that reduce to chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from decoding import WithDraft, make_decode_fn
from decoding.speculative.draft_model import draw_children
from decoding.speculative.rsd import grown, next_beams
from decoding.speculative.tree import branching
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, texts

DRAWS = 40_000
LAW = np.array([0.45, 0.3, 0.15, 0.07, 0.03])
KEYS = jax.random.split(jax.random.key(7), DRAWS)
DRAWN = jnp.zeros((DRAWS,), bool)
jitted_children = jax.jit(draw_children, static_argnums=1)
jitted_beams = jax.jit(next_beams, static_argnums=3)


def laws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.7), shape[:-1]).astype(np.float32)


def pair_law(law: np.ndarray) -> np.ndarray:
    """Returns f64[V * V]: the probability of two ordered draws without replacement."""
    pairs = law[:, None] * law[None, :] / (1 - law[:, None])
    np.fill_diagonal(pairs, 0.0)
    return pairs.reshape(-1)


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    assert counts[law == 0].sum() == 0
    expected = law[law > 0] * counts.sum()
    return stats.chisquare(counts[law > 0], expected / expected.sum() * counts.sum()).pvalue


def test_children_are_a_draw_without_replacement():
    law = jnp.broadcast_to(jnp.asarray(LAW, jnp.float32), (DRAWS, 1, 5))
    tokens, alive = jitted_children(law, 2, KEYS, DRAWN)
    first, second = np.asarray(tokens)[:, 0].T
    assert alive.all() and (first != second).all()
    counts = np.bincount(first * 5 + second, minlength=25)
    assert p_value(counts, pair_law(LAW)) > 1e-3
    unordered = np.bincount(np.minimum(first, second) * 5 + np.maximum(first, second), minlength=25)
    assert p_value(unordered + unordered.reshape(5, 5).T.reshape(-1), pair_law(LAW)) < 1e-6, "order is part of the law"


def test_children_end_where_the_law_ends():
    law = jnp.asarray([[[0.0, 0.7, 0.0, 0.3]]])
    for ranked in (False, True):
        tokens, alive = draw_children(law, 3, KEYS[:1], jnp.asarray([ranked]))
        assert alive[0, 0].tolist() == [True, True, False] and set(tokens[0, 0, :2].tolist()) == {1, 3}


def test_ranked_children_are_the_likeliest():
    law = laws(3, 4, 9)
    tokens, _ = draw_children(jnp.asarray(law), 5, KEYS[:3], jnp.ones((3,), bool))
    np.testing.assert_array_equal(tokens, np.argsort(-law, axis=-1, kind="stable")[..., :5])


def test_a_rows_best_child_has_the_rows_own_value():
    law, log_q = laws(6, 3, 8), np.log(laws(6, 3, seed=1))
    value = np.sort(np.random.default_rng(2).gumbel(size=(6, 3)).astype(np.float32))[:, ::-1]
    place, token, new_log_q, new = jitted_beams(law, log_q, value, 24, KEYS[:6], jnp.zeros((6,), bool))
    place, token, new_log_q, new = map(np.asarray, (place, token, new_log_q, new))
    assert (np.diff(new, axis=1) <= 0).all()
    for b in range(6):
        assert len(set(zip(place[b], token[b], strict=True))) == 24
        best = [new[b][place[b] == row].max() for row in range(3)]
        np.testing.assert_allclose(best, value[b], atol=1e-5)
    expected = np.take_along_axis(log_q, place, 1) + np.log(law[np.arange(6)[:, None], place, token])
    np.testing.assert_allclose(new_log_q, expected, rtol=1e-5)


def test_beams_without_noise_are_beam_search():
    law, log_q = laws(2, 3, 8), np.log(laws(2, 3, seed=1))
    place, token, score, _ = jitted_beams(law, log_q, log_q, 4, KEYS[:2], jnp.ones((2,), bool))
    scores = (log_q[..., None] + np.log(law)).reshape(2, -1)
    order = np.argsort(-scores, axis=1)[:, :4]
    np.testing.assert_array_equal(np.asarray(place) * 8 + token, order)
    np.testing.assert_allclose(score, np.take_along_axis(scores, order, 1), rtol=1e-5)


def test_beams_that_run_out_are_dead():
    law = jnp.asarray([[[0.0, 1.0, 0.0]]])
    place, token, _, value = jitted_beams(law, jnp.zeros((1, 1)), jnp.zeros((1, 1)), 3, KEYS[:1], jnp.zeros((1,), bool))
    assert value[0, 0] == 0.0 and (place[0, 0], token[0, 0]) == (0, 1) and (value[0, 1:] == -jnp.inf).all()
    _, _, _, value = jitted_beams(law, jnp.zeros((1, 1)), value[:, 1:2], 3, KEYS[:1], jnp.zeros((1,), bool))
    assert (value == -jnp.inf).all()


def test_grown_ancestors_are_the_templates():
    template = branching((2, 2, 1))
    ancestors = jnp.ones((1, 1, 1), bool)
    for start, stop in template.levels:
        ancestors = grown(ancestors, jnp.asarray(template.parent[None, start:stop]))
    np.testing.assert_array_equal(ancestors[0], template.ancestors)


CHAINS = {"rsd_c": {"children": (1, 1, 1)}, "rsd_s": {"beams": 1, "depth": 3}}


@pytest.mark.parametrize("method", CHAINS)
def test_trees_of_one_child_are_chains(tiny, method):
    """Greedy rows draft and accept the same tokens as speculative sampling does."""
    model, params = tiny
    draft = jax.tree.map(lambda x: x + 0.05 * jnp.std(x), params)
    chain = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model, length=3)
    tree = make_decode_fn(model, method, max_new_tokens=ROOM, draft=model, **CHAINS[method])
    ours, theirs = (fn(WithDraft(params, draft), PROMPTS) for fn in (tree, chain))
    assert texts(ours) == texts(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours.stats, theirs.stats)


def test_a_wide_tree_accepts_more_than_its_own_chain(tiny):
    """Greedy, with a draft that is the target with noise: a tree of depth 3 holds the likeliest chain, and more."""
    model, params = tiny
    keys = iter(jax.random.split(jax.random.key(3), 100))
    noisy = jax.tree.map(lambda x: x + 0.25 * jnp.std(x) * jax.random.normal(next(keys), x.shape), params)
    steps = {}
    for name, children in (("chain", (1, 1, 1)), ("tree", (3, 2, 2))):
        fn = make_decode_fn(model, "rsd_c", max_new_tokens=ROOM, draft=model, children=children)
        steps[name] = np.asarray(fn(WithDraft(params, noisy), PROMPTS).stats.steps)
    assert (steps["tree"] <= steps["chain"]).all(), steps
    assert steps["tree"].sum() < 0.9 * steps["chain"].sum() and steps["chain"].sum() < ROOM * len(PROMPTS), steps


def test_the_model_as_its_own_draft_is_always_accepted(tiny):
    """p = q at every temperature: RSD-C emits depth + 1 tokens in every step but a row's last."""
    model, params = tiny
    fn = make_decode_fn(model, "rsd_c", max_new_tokens=ROOM, draft=model, children=(2, 1))
    for temperature in (0.0, 1.0):
        stats = fn(WithDraft(params, params), PROMPTS, 3, temperature=temperature).stats
        np.testing.assert_array_equal(stats.steps, [ROOM // 3] * len(PROMPTS))


def test_what_cannot_be(tiny):
    model, params = tiny
    block = BlockConfig(AttentionConfig(2, 1, 8), MLPConfig(24))
    other = Decoder(DecoderConfig("llama", vocab_size=60, width=16, blocks=(block,), max_length=64))
    for options, message in (
        ({}, "drafts with a second model"),
        ({"draft": "smollm2"}, "drafts with a second model"),
        ({"draft": other}, "60 token ids, the target 61"),
        ({"draft": model, "children": (2, 0)}, "at least one child"),
        ({"draft": model, "children": (62,)}, "62 siblings"),
        ({"draft": model, "draft_temperature": 0.0}, "must be above 0"),
        ({"draft": model, "children": 3}, "wrong type"),
    ):
        with pytest.raises(InputError, match=message):
            make_decode_fn(model, "rsd_c", **options)
    with pytest.raises(InputError, match="beams and depth must be at least 1"):
        make_decode_fn(model, "rsd_s", draft=model, beams=0)
    fn = make_decode_fn(model, "rsd_c", draft=model, children=(1,))
    with pytest.raises(InputError, match="WithDraft"):
        fn(params, PROMPTS)
    with pytest.raises(InputError, match="not WithDraft"):
        make_decode_fn(model)(WithDraft(params, params), PROMPTS)
