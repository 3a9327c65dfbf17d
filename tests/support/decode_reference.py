"""Slow, plain references for the decoding room, and the ragged batch that its tests share.

Tests that use `PROMPTS` and `ROOM` with the same method and model share one compiled function.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder

ROOM = 24  # new tokens per row
LENGTHS = (1, 5, 16, 3, 9, 12, 2, 7)  # one token, and exactly a bucket, among them
PROMPTS = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in LENGTHS]
_WIDTH = 64
_CLEAR = 1e-4  # logits; another order of additions moves them by about a tenth of this


@functools.partial(jax.jit, static_argnums=0)
def forward(model: Decoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the logits f32[B, T, V] of whole rows i32[B, T], without any cache."""
    return model.apply({"params": params}, tokens).logits


def greedy_texts(
    model: Decoder, params: Any, prompts: Sequence[Sequence[int]], num: int, penalty: float = 1.0
) -> list[list[int]]:
    """Returns `num` greedy tokens per prompt: the whole row runs through the model for every single token.

    Rows are padded on the right to one width, which a causal model cannot see. Fails when a choice is too close to
    call: another order of additions could then give another text, and the test needs another prompt.

    Args:
        model: the network.
        params: its parameters.
        prompts: lists of token ids, shorter than 64 - `num`.
        num: new tokens per row.
        penalty: repetition penalty.
    """
    rows = [list(prompt) for prompt in prompts]
    for _ in range(num):
        padded = np.array([row + [0] * (_WIDTH - len(row)) for row in rows], np.int32)
        logits = np.asarray(forward(model, params, padded))
        for row, row_logits in zip(rows, logits, strict=True):
            scores = penalised(row_logits[len(row) - 1], set(row), penalty)
            second, first = np.sort(scores)[-2:]
            assert first - second > _CLEAR, f"too close to call: {first} and {second}"
            row.append(int(np.argmax(scores)))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def penalised(logits: np.ndarray, seen: set[int], penalty: float) -> np.ndarray:
    """Returns f64[V]: the logits with the repetition penalty on the tokens in `seen`."""
    scores = [float(x) for x in logits]
    for token in seen:
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    return np.array(scores)


def filtered(
    logits: np.ndarray,
    seen: set[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> tuple[np.ndarray, bool]:
    """Returns the logits of the law to sample from, and whether a token is too close to a limit to compare.

    Args:
        logits: f32[V].
        seen: tokens that the repetition penalty concerns.
        temperature: see `decoding.sampling.Sampling` for this and the rest.
        top_k: kept by sorting.
        top_p: kept by walking down the sorted law.
        min_p: kept by comparing probabilities.
        repetition_penalty: applied first.
    """
    scores = penalised(logits, seen, repetition_penalty)
    if temperature == 0:
        return np.where(scores == scores.max(), scores, -np.inf), False
    scores = scores / temperature
    close = False
    if top_k > 0:
        kth = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores = np.where(scores >= kth, scores, -np.inf)
    if top_p < 1:
        law = softmax(scores)
        total = 0.0
        for token in np.argsort(-law, kind="stable"):
            close |= abs(total + law[token] - top_p) < 1e-5
            total += law[token]
            if total >= top_p:
                break
        scores = np.where(law >= law[token], scores, -np.inf)
    if min_p > 0:
        share = softmax(scores) / softmax(scores).max()
        close |= bool(np.any((np.abs(share - min_p) < 1e-5) & (share < 1)))
        scores = np.where(share >= min_p, scores, -np.inf)
    return scores, close


def softmax(scores: np.ndarray) -> np.ndarray:
    """Returns f64[V] probabilities."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def chi_squared_p(tokens: np.ndarray, law: np.ndarray) -> float:
    """Returns the p-value of draws i[N] under a law f64[V]; 0.0 when an impossible token was drawn.

    Cells that expect fewer than five draws are counted together.
    """
    counts = np.bincount(np.asarray(tokens), minlength=len(law)).astype(np.float64)
    if counts[law == 0].any():
        return 0.0
    expected = law / law.sum() * counts.sum()
    rare = (expected < 5) & (law > 0)
    usual = expected >= 5
    counts, expected = [*counts[usual]], [*expected[usual], *([expected[rare].sum()] if rare.any() else [])]
    counts = counts + [len(tokens) - sum(counts)] * (len(expected) - len(counts))
    return float(stats.chisquare(counts, expected).pvalue)


def texts(output: Any) -> list[list[int]]:
    """Returns the rows of a `DecodeOutput`, cut at their lengths, after checking that only zeros lie behind."""
    tokens, lengths = np.asarray(output.tokens), np.asarray(output.lengths)
    assert tokens.dtype == np.int32 and lengths.dtype == np.int32
    assert not tokens[np.arange(tokens.shape[1])[None, :] >= lengths[:, None]].any(), "tokens behind a row's length"
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def row_seeds(count: int = len(PROMPTS)) -> list[int]:
    """Returns one seed per row."""
    return [11 * row + 5 for row in range(count)]


def keys_data(keys: jax.Array) -> np.ndarray:
    """Returns random keys as plain numbers."""
    return np.asarray(jax.random.key_data(keys))


@functools.cache
def small_law_model() -> tuple[Decoder, Any]:
    """Returns a one-layer model over five tokens whose laws are far from uniform and differ by context."""
    block = BlockConfig(AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4), MLPConfig(12))
    model = Decoder(DecoderConfig("llama", vocab_size=5, width=8, blocks=(block,), max_length=64))
    params = jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: x * 25.0 if x.ndim == 2 else x, params)


def exact_pairs_behind(prompt: Sequence[int], settings: dict[str, float]) -> np.ndarray:
    """Returns f64[V * V]: the probability of each pair of first two tokens of `small_law_model`, by whole passes."""
    model, params = small_law_model()

    def law(tokens: list[int]) -> np.ndarray:
        logits = np.asarray(forward(model, params, np.array([tokens], np.int32)))[0, -1]
        scores, close = filtered(logits, set(tokens), **settings)
        assert not close, "a token lies too close to a limit: choose other settings"
        return softmax(scores)

    first = law([*prompt])
    return np.concatenate([first[token] * law([*prompt, token]) for token in range(model.config.vocab_size)])


def noisy(params: Any, scale: float, seed: int = 5) -> Any:
    """Returns parameters with noise of `scale` times each array's own deviation: a draft that is often right."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    off = [x + scale * jnp.std(x) * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, off)
