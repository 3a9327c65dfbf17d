"""Contrastive search against a loop over whole forward passes, and its cache against a fresh one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoding.prefill
from decoding import make_decode_fn
from decoding.prefill import Prompts, prefill
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts

K = 4
CLEAR = 1e-4


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, tokens):
    """Returns (logits f32[B, T, V], states f32[B, T, D] behind the final norm) of whole rows i32[B, T]."""

    def run(module, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        x = module.layers(module.embed(tokens, positions), positions)[0]
        return module.unembed(x), module.final_norm(x)

    return model.apply({"params": params}, tokens, method=run)


def reference(model, params, prompt, k: int, alpha: float, room: int = ROOM) -> list[int]:
    """Returns the text, each candidate of each token read in a whole pass; fails where a choice is too close."""
    row = list(prompt)
    for _ in range(room):
        logits = np.asarray(whole(model, params, padded([row]))[0], np.float64)[0, len(row) - 1]
        law = np.exp(logits - logits.max())
        law /= law.sum()
        best = np.argsort(-law, kind="stable")[:k]
        states = np.asarray(whole(model, params, padded([[*row, token] for token in best]))[1], np.float64)
        states = states[:, : len(row) + 1] / np.linalg.norm(states[:, : len(row) + 1], axis=-1, keepdims=True)
        likeness = (states[:, :-1] @ states[:, -1, :, None])[..., 0].max(axis=1)
        scores = (1 - alpha) * law[best] - alpha * likeness
        assert k == 1 or np.diff(np.sort(scores)[-2:])[0] > CLEAR, "too close to call"
        row.append(int(best[np.argmax(scores)]))
    return row[len(prompt) :]


def padded(rows) -> np.ndarray:
    return np.array([[*row, *[0] * (64 - len(row))] for row in rows], np.int32)


@pytest.fixture(scope="module")
def contrastive(tiny):
    return make_decode_fn(tiny[0], "contrastive", max_new_tokens=ROOM, k=K)


def test_without_a_penalty_and_with_one_candidate_it_is_greedy(tiny, contrastive):
    greedy = greedy_texts(*tiny, PROMPTS, ROOM)
    assert texts(contrastive(tiny[1], PROMPTS, alpha=0.0)) == greedy
    single = make_decode_fn(tiny[0], "contrastive", max_new_tokens=ROOM, k=1)
    assert texts(single(tiny[1], PROMPTS, alpha=0.9)) == greedy


def test_text_equals_the_reference_for_every_rows_alpha(tiny, contrastive):
    alphas = [0.2, 0.4, 0.6, 0.8, 1.0, 0.3, 0.5, 0.7]
    wanted = [reference(*tiny, prompt, K, alpha) for prompt, alpha in zip(PROMPTS, alphas, strict=True)]
    assert texts(contrastive(tiny[1], PROMPTS, alpha=alphas)) == wanted
    assert sum(text != greedy for text, greedy in zip(wanted, greedy_texts(*tiny, PROMPTS, ROOM), strict=True)) > 5


def test_candidates_one_after_another_give_the_same_text(tiny, contrastive):
    together = contrastive(tiny[1], PROMPTS)
    apart = make_decode_fn(tiny[0], "contrastive", max_new_tokens=ROOM, k=K, sequential=True)(tiny[1], PROMPTS)
    assert texts(apart) == texts(together)
    np.testing.assert_array_equal(together.stats.target_calls, [ROOM] * len(PROMPTS))
    np.testing.assert_array_equal(apart.stats.target_calls, [K * ROOM] * len(PROMPTS))


def test_only_the_chosen_candidates_stay_in_the_cache(tiny, contrastive):
    model, params = tiny
    inputs = contrastive.inputs(PROMPTS, max_new_tokens=[ROOM, 5, 0, 3, 9, 2, 7, 1])
    state = contrastive.advance(params, contrastive.start(params, *inputs))
    rows = [[*prompt, *text] for prompt, text in zip(PROMPTS, texts(contrastive.output(state)), strict=True)]
    lengths = np.array([len(row) for row in rows], np.int32)
    np.testing.assert_array_equal(state.cache.length, lengths)
    whole_rows = Prompts(padded([[*row, 0] for row in rows]), lengths + 1)
    cache = jax.jit(functools.partial(prefill, model, num_slots=64))(params, prompts=whole_rows)
    states = np.asarray(whole(model, params, padded(rows))[1])
    states = states / np.linalg.norm(states, axis=-1, keepdims=True)
    for row, length in enumerate(lengths):
        for ours, fresh in zip(
            jax.tree.leaves((state.cache.k, state.cache.v)), jax.tree.leaves((cache.k, cache.v)), strict=True
        ):
            np.testing.assert_allclose(ours[row, :, :length], fresh[row, :, :length], atol=1e-4)
        np.testing.assert_allclose(state.carry.units[row, :length], states[row, :length], atol=1e-4)
    logits = np.asarray(whole(model, params, padded(rows))[0])[0, lengths[0] - 1]  # of the row that ran to the end
    np.testing.assert_allclose(state.carry.chances[0], -np.sort(-jax.nn.softmax(logits))[:K], atol=1e-4)


def test_prompts_in_chunks(tiny, monkeypatch):
    prompts = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in (40, 7, 33)]
    fn = make_decode_fn(tiny[0], "contrastive", max_new_tokens=8, k=K)
    wanted = [reference(*tiny, prompt, K, 0.6, 8) for prompt in prompts]
    monkeypatch.setattr(decoding.prefill, "CHUNK", 16)
    assert texts(fn(tiny[1], prompts)) == wanted


def test_a_stop_token_ends_a_row(tiny, contrastive):
    plain = texts(contrastive(tiny[1], PROMPTS))
    stops = {plain[0][3], plain[5][9]}
    fn = make_decode_fn(tiny[0], "contrastive", max_new_tokens=ROOM, k=K, stop_tokens=sorted(stops))
    ends = [min([i + 1 for i, token in enumerate(text) if token in stops], default=ROOM) for text in plain]
    assert len(set(ends)) > 2
    assert texts(fn(tiny[1], PROMPTS)) == [text[:end] for text, end in zip(plain, ends, strict=True)]


def test_a_full_cache_ends_a_row(tiny):
    """The cache then holds every token, and has had room for all candidates of the last one."""
    fn = make_decode_fn(tiny[0], "contrastive", max_new_tokens=ROOM, k=K, cache_slots=20)
    output = fn(tiny[1], PROMPTS[1:2])
    assert int(output.lengths[0]) == 20 - K - len(PROMPTS[1]) + 1
    assert texts(output) == [reference(*tiny, PROMPTS[1], K, 0.6, int(output.lengths[0]))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 62}, "k must be at most the vocabulary's 61 tokens, got 62"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, "alpha must be in"),
        ({"top_k": 4}, "option of method 'contrastive' 'top_k'"),
    ],
)
def test_options_that_cannot_be(tiny, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(tiny[0], "contrastive", **options)
