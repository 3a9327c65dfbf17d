"""RAPID's three modes against laws found by enumeration: what each keeps, and how far `rapid` is from the target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.plan import decode
from decoding.speculative import rapid, speculative_sampling
from decoding.speculative.draft_model import draw_next
from decoding.speculative.rapid import RapidOptions, rule, tilted
from decoding.speculative.tree import TokenTree, chain
from models.errors import InputError
from tests.support.decode_reference import (
    PROMPTS,
    ROOM,
    chi_squared_p,
    filtered,
    forward,
    greedy_texts,
    noisy,
    small_law_model,
    softmax,
    texts,
)
from tests.support.toy_law import DEPTH, DRAWS, FIRST, VOCAB, draft, drawn_pairs, exact_pairs, run, settings, table

P, Q = table(0), table(1)
ETA, ALPHA = 10.0, 0.1
MODES = ("sd", "rapid", "tilt_exact")
WARMER = {"temperature": 0.6, "top_p": 0.97, "repetition_penalty": 1.5}


@functools.cache
def rule_of(mode: str, eta: float = ETA):
    """Returns a mode's rule; the same object each time, so that it compiles once."""
    return rule(RapidOptions(mode=mode) if mode == "sd" else RapidOptions(mode=mode, eta=eta))


@functools.cache
def chains() -> TokenTree:
    return draft(chain(DEPTH), "wor", Q)


def tilted_law(p: np.ndarray, q: np.ndarray, eta: float = ETA) -> np.ndarray:
    """Returns f64[V]: p_hat, as a reweighting of p."""
    weights = p * np.exp(np.where(q >= ALPHA * q.max(), eta * (q - p), 0.0))
    return weights / weights.sum()


def emitted_law(mode: str, p: np.ndarray, q: np.ndarray, eta: float = ETA) -> np.ndarray:
    """Returns f64[V]: what a drafted place emits, summed over every draft x ~ q and both outcomes of its trial."""
    p_hat = p if mode == "sd" else tilted_law(p, q, eta)
    out, rejected = np.zeros(len(p)), 0.0
    for token, chance in enumerate(q):
        keep = min(1.0, p_hat[token] / chance) if chance > 0 else 0.0
        out[token] += chance * keep
        rejected += chance * (1.0 - keep)
    left = np.maximum(p - np.minimum(q, p_hat), 0.0) if mode == "rapid" else np.maximum(p_hat - q, 0.0)
    return out + (rejected * left / left.sum() if left.sum() > 0 else rejected * p)


def pair_law(mode: str, eta: float = ETA, **changes: float) -> np.ndarray:
    """Returns f64[V * V]: the law of the first two tokens, both drafted."""

    def at(prefix: int, seen: set[int]) -> np.ndarray:
        p = softmax(filtered(np.log(P[prefix].astype(np.float64)), seen, **changes)[0])
        return emitted_law(mode, p, Q[prefix] / Q[prefix].sum(dtype=np.float64), eta)

    first = at(0, {FIRST})
    return np.concatenate([first[token] * at(1 + token, {FIRST, token}) for token in range(VOCAB)])


def bias(p: np.ndarray, q: np.ndarray, eta: float = ETA) -> float:
    """Returns sum (m - p)+."""
    return float(np.maximum(np.minimum(q, tilted_law(p, q, eta)) - p, 0.0).sum())


@pytest.mark.parametrize("eta", [0.0, 5.0, 10.0, 50.0])
def test_the_papers_rule_is_off_by_what_m_exceeds_p(eta):
    rng, biases = np.random.default_rng(5), []
    for vocab in (2, 4, 50):
        for p, q in zip(rng.dirichlet([0.8] * vocab, 50), rng.dirichlet([0.8] * vocab, 50), strict=True):
            out = {mode: emitted_law(mode, p, q, eta) for mode in MODES}
            biases.append(bias(p, q, eta))
            np.testing.assert_allclose(out["sd"], p, atol=1e-9)
            np.testing.assert_allclose(out["tilt_exact"], tilted_law(p, q, eta), atol=1e-9)
            np.testing.assert_allclose(0.5 * np.abs(out["rapid"] - p).sum(), biases[-1], atol=1e-9)
    assert max(biases) < 1e-12 if eta == 0 else np.mean(biases) > 0.05


@pytest.mark.parametrize("changes", [{}, WARMER], ids=["plain", "filtered"])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_emits_its_own_law(mode, changes):
    exact = pair_law(mode, **changes)
    if mode == "sd":
        np.testing.assert_allclose(exact, exact_pairs(P, **changes), atol=1e-9)
    verified = run(rule_of(mode), chains(), P, settings(**changes))
    assert chi_squared_p(drawn_pairs(verified, exact), exact) > 1e-3
    for other in set(MODES) - {mode}:
        assert chi_squared_p(drawn_pairs(verified, exact), pair_law(other, **changes)) < 1e-6, f"not that of {other}"


def test_rapid_is_not_lossless_and_its_distance_is_the_formulas():
    p, q = P[0].astype(np.float64), Q[0].astype(np.float64)
    first = run(rule_of("rapid"), chains(), P).tokens[:, 0]
    assert chi_squared_p(first, p) < 1e-6
    more = np.minimum(q, tilted_law(p, q)) > p
    measured = np.isin(first, np.flatnonzero(more)).mean() - p[more].sum()
    error = np.sqrt(0.25 / DRAWS)
    assert bias(p, q) > 0.05 and abs(measured - bias(p, q)) < 4 * error


def test_the_law_is_lost_with_the_residual_of_plain_sampling(monkeypatch):
    """The planted bug: tilt_exact that replaces a rejected token as if it had been tested against p."""
    monkeypatch.setitem(rapid.RESIDUALS, "tilt_exact", lambda p, q, p_hat: (jnp.maximum(p - q, 0.0), p))
    verified = run(rule(RapidOptions(mode="tilt_exact", eta=ETA)), chains(), P)
    exact = pair_law("tilt_exact")
    assert chi_squared_p(drawn_pairs(verified, exact), exact) < 1e-6


def test_the_last_token_is_the_targets_own():
    """Behind a chain that was kept whole nothing tilts."""
    verified = run(rule_of("tilt_exact"), chains(), P)
    tokens = verified.tokens[verified.count == DEPTH + 1]
    prefix = np.zeros(len(tokens), np.int64)
    for depth in range(DEPTH):
        prefix = prefix * VOCAB + 1 + tokens[:, depth]
    common = np.bincount(prefix).argmax()
    assert chi_squared_p(tokens[prefix == common, DEPTH], P[common].astype(np.float64)) > 1e-3


@pytest.mark.parametrize("mode", ["rapid", "tilt_exact"])
def test_without_a_tilt_all_modes_keep_and_write_the_same(mode):
    mixed = {"temperature": np.arange(DRAWS) % 3 * 0.7}
    for changes in ({}, WARMER, {"temperature": 0.0}, mixed):
        plain = run(rule_of("sd"), chains(), P, settings(**changes))
        untilted = run(rule_of(mode, 0.0), chains(), P, settings(**changes))
        for name in ("rows", "tokens", "count"):
            np.testing.assert_array_equal(getattr(plain, name), getattr(untilted, name))
    assert len(set(plain.count.tolist())) == DEPTH + 1


@pytest.mark.parametrize("mode", MODES)
def test_a_draft_equal_to_the_target_is_accepted_whole(mode):
    verified = run(rule_of(mode), draft(chain(DEPTH), "wor", P), P)
    assert (verified.count == DEPTH + 1).all()


def test_a_small_tilt_accepts_more_and_a_large_one_overshoots():
    means = [run(rule_of("rapid", eta), chains(), P).count.mean() for eta in (0.0, 3.0, 40.0)]
    assert means[1] > means[0] + 0.05 and means[1] > means[2] + 0.05


@pytest.mark.parametrize("mode", ["rapid", "tilt_exact"])
def test_greedy_rows_write_the_likeliest_tokens_of_the_tilted_law(mode):
    tree, sampled = chains(), np.arange(DRAWS) % 2 == 1
    greedy = run(rule_of(mode), tree, P, settings(temperature=0.0))
    for row in range(300):
        prefix, text = 0, []
        for token in tree.tokens[row, 1 : DEPTH + 1]:
            text.append(int(tilted_law(P[prefix].astype(np.float64), Q[prefix].astype(np.float64)).argmax()))
            prefix = prefix * VOCAB + 1 + text[-1]
            if text[-1] != token:
                break
        else:
            text.append(int(P[prefix].argmax()))
        assert greedy.tokens[row, : greedy.count[row]].tolist() == text
    assert len(set(greedy.count.tolist())) >= 3
    assert (greedy.tokens != run(rule_of("sd"), tree, P, settings(temperature=0.0)).tokens).any()
    mixed = run(rule_of(mode), tree, P, settings(temperature=sampled))
    for name in ("tokens", "count", "rows"):
        np.testing.assert_array_equal(getattr(greedy, name)[~sampled], getattr(mixed, name)[~sampled])


def test_the_tilted_law_is_a_law_and_leaves_the_drafts_tail_alone():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(64, 40)).astype(np.float32) * 3
    scores[:, 7] = -np.inf  # a token that the target may not draw
    q = rng.dirichlet([0.3] * 40, 64).astype(np.float32)
    p, p_hat = jax.nn.softmax(scores), np.asarray(jax.nn.softmax(tilted(scores, q, ETA, ALPHA)))
    np.testing.assert_allclose(p_hat.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(p_hat, [tilted_law(*row) for row in zip(np.float64(p), q, strict=True)], atol=1e-6)
    assert not p_hat[:, 7].any()
    ratio = np.delete(p_hat / np.maximum(p, 1e-30), 7, axis=1)
    masked = np.delete(q < ALPHA * q.max(axis=1, keepdims=True), 7, axis=1)
    for some, where in zip(ratio, masked, strict=True):
        assert 2 < where.sum() < 39
        np.testing.assert_allclose(some[where], some[where][0], rtol=1e-4)
        assert np.ptp(some[~where]) > 1e-3 * some[where][0] or (~where).sum() == 1
    np.testing.assert_array_equal(tilted(scores, q, 0.0, ALPHA), scores)


WHOLE, SHORT = [2, 0, 3], [1, 3]  # what the target reads, and what the draft reads


def first_law(mode: str, text: list[int]) -> np.ndarray:
    """Returns f64[V]: what a drafted place behind a text emits, of models with two prompts."""
    model, params = small_law_model()
    p, q = (
        softmax(np.float64(forward(model, weights, np.array([prompt + text], np.int32))[0, -1]))
        for weights, prompt in ((params, WHOLE), (noisy(params, 0.3, 3), SHORT))
    )
    return emitted_law(mode, p, q)


def drawn(mode: str, num: int) -> np.ndarray:
    """Returns i32[DRAWS, num]: tokens that such models write, of chains of as many."""
    model, params = small_law_model()
    fn = make_decode_fn(model, "rapid", max_new_tokens=num, draft=model, length=num, eta=ETA, mode=mode)
    inputs = fn.inputs([WHOLE] * DRAWS, draft_prompts=[SHORT] * DRAWS, temperature=1.0)
    both = WithDraft(params, noisy(params, 0.3, 3))
    return np.asarray(jax.jit(functools.partial(decode, fn.plan))(both, *inputs).tokens)  # traced anew each time


def test_models_with_two_prompts_follow_the_enumerated_law():
    def pairs(mode: str) -> np.ndarray:
        return np.concatenate([p * first_law(mode, [token]) for token, p in enumerate(first_law(mode, []))])

    tokens = drawn("rapid", 2)
    tokens = tokens[:, 0] * 5 + tokens[:, 1]
    assert chi_squared_p(tokens, pairs("rapid")) > 1e-3
    assert chi_squared_p(tokens, pairs("sd")) < 1e-6, "not the target's"


@pytest.mark.parametrize("mode", MODES)
def test_the_law_is_lost_with_a_chain_of_another_law_than_stated(monkeypatch, mode):
    assert chi_squared_p(drawn(mode, 1)[:, 0], first_law(mode, [])) > 1e-3

    def bug(*arguments):
        token, law = draw_next(*arguments)
        return token, jnp.sqrt(law) / jnp.sqrt(law).sum(axis=-1, keepdims=True)

    monkeypatch.setattr(speculative_sampling, "draw_next", bug)
    assert chi_squared_p(drawn(mode, 1)[:, 0], first_law(mode, [])) < 1e-6


def rapid_fn(model, **options):
    return make_decode_fn(model, "rapid", max_new_tokens=ROOM, draft=model, length=3, **options)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_model_as_its_own_draft_with_the_whole_context_is_always_accepted(tiny, temperature):
    model, params = tiny
    stats = rapid_fn(model)(WithDraft(params, params), PROMPTS, 1, temperature=temperature).stats
    np.testing.assert_array_equal(stats.steps, [ROOM // 4] * len(PROMPTS))
    np.testing.assert_array_equal(stats.accepted, [ROOM * 3 // 4] * len(PROMPTS))


def test_a_draft_that_reads_less_changes_greedy_text_where_the_target_leans_on_it(tiny):
    model, params = tiny
    both, plain, short = WithDraft(params, params), greedy_texts(*tiny, PROMPTS, ROOM), [p[-1:] for p in PROMPTS]
    assert texts(rapid_fn(model, mode="sd")(both, PROMPTS, draft_prompts=short)) == plain
    assert texts(rapid_fn(model, eta=40.0)(both, PROMPTS, draft_prompts=short)) != plain


def test_without_a_tilt_it_is_speculative_sampling():
    model, params = small_law_model()
    both, prompts = WithDraft(params, noisy(params, 0.3, 3)), [[2, 0, 3], [1], [4, 4], [0, 3, 1, 2]] * 8
    warm = {"temperature": [0.0, 0.5, 0.9, 1.3] * 8, "repetition_penalty": 1.2}
    plain = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model, length=3)
    expected, output = plain(both, prompts, 3, **warm), rapid_fn(model, eta=0.0)(both, prompts, 3, **warm)
    assert texts(output) == texts(expected)
    jax.tree.map(np.testing.assert_array_equal, output.stats, expected.stats)
    assert 0 < np.asarray(output.stats.accepted).sum() < np.asarray(output.stats.drafted).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be"),
        ({"mode": "tilt"}, "Did you mean 'tilt_exact'"),
        ({"eta": -1.0}, "eta must be"),
        ({"eta": float("nan")}, "eta must be"),
        ({"eta": float("inf")}, "eta must be"),
        ({"eta": "ten"}, "wrong type"),
        ({"alpha": 1.5}, "alpha must be"),
        ({"draft_temperature": 0.0}, "draft_temperature"),
        ({"draft": None}, "drafts with a second model"),
    ],
)
def test_options_that_cannot_be(tiny, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(tiny[0], "rapid", **({"draft": tiny[0]} | options))
