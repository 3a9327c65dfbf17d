"""What the tests of searches share: every text that a search returns, scored by whole forward passes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from decoding.state import Hypotheses
from models.decoder import Decoder
from tests.support.decode_reference import PROMPTS, forward


def log_probs(model: Decoder, params: Any, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Returns f64[T]: log p of each token behind the prompt and those before it, by one whole pass."""
    row = np.array([[*prompt, *tokens]], np.int32)
    padded = np.pad(row, ((0, 0), (0, 64 - row.shape[1])))
    logits = np.asarray(forward(model, params, padded), np.float64)[0, len(prompt) - 1 : row.shape[1] - 1]
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[np.arange(len(tokens)), tokens]


def hypotheses(found: Hypotheses, row: int) -> list[list[int]]:
    """Returns the texts found for a row, after checking that only zeros lie behind them."""
    tokens, lengths = np.asarray(found.tokens)[row], np.asarray(found.lengths)[row]
    assert not tokens[np.arange(tokens.shape[1])[None, :] >= lengths[:, None]].any()
    return [text[:length].tolist() for text, length in zip(tokens, lengths, strict=True)]


def check_scores(
    model: Decoder, params: Any, found: Hypotheses, penalty: float, prompts: Sequence[Sequence[int]] = PROMPTS
) -> None:
    """Fails where a score is not that of whole passes to 1e-4, or texts are out of order."""
    for row, prompt in enumerate(prompts):
        scores = np.asarray(found.scores)[row]
        assert (np.diff(scores) <= 1e-6).all(), "best first"
        for index, text in enumerate(hypotheses(found, row)):
            wanted = log_probs(model, params, prompt, text)
            np.testing.assert_allclose(found.token_log_probs[row, index, : len(text)], wanted, atol=1e-4)
            np.testing.assert_allclose(found.log_probs[row, index], wanted.sum(), atol=1e-4)
            np.testing.assert_allclose(scores[index], wanted.sum() / len(text) ** penalty, atol=1e-4)
