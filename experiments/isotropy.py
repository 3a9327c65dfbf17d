"""How isotropic a model's hidden states are, layer by layer (2210.14140, section 3).

isotropy = 1 - (sum of the cosines of all ordered pairs of different tokens of a text, over all texts) / (their number):
near 1 where states point everywhere, near 0 where they point one way. Pairs of all texts are pooled, so that long texts
weigh more. A few large coordinates, which every state shares, can make cosines high by themselves: so the figure is
also taken with the mean state of all texts removed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding.prefill import pad_prompts
from models.decoder import Decoder
from models.errors import InputError


def pooled_isotropy(states: Sequence[np.ndarray], centred: bool = False) -> float:
    """Returns the isotropy of texts, each f[T, D] of its tokens' states; `centred`: with the mean of all removed.

    Raises InputError where no text has two tokens.
    """
    pairs = sum(len(text) * (len(text) - 1) for text in states)
    if not pairs:
        raise InputError("isotropy compares tokens of one text: there must be a text of two tokens or more")
    mean = np.concatenate(states).mean(axis=0) if centred else 0.0
    total = 0.0
    for text in states:
        moved = np.asarray(text, np.float64) - mean
        units = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
        total += float(np.square(units.sum(axis=0)).sum() - np.square(units).sum())
    return 1.0 - total / pairs


def layer_isotropy(model: Decoder, params: Any, texts: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """Returns {"0".. (behind each layer), "normed" (what the head reads): {"raw": .., "centred": ..}} over texts."""
    padded = pad_prompts(texts, model.config.vocab_size)
    hidden, normed = _states(model, params, jnp.asarray(padded.tokens))
    sides = {**{str(layer - 1): value for layer, value in sorted(hidden.items())}, "normed": normed}
    found = {}
    for name, value in sides.items():
        value = np.asarray(value, np.float32)
        rows = [row[:length] for row, length in zip(value, padded.lengths, strict=True)]
        found[name] = {"raw": pooled_isotropy(rows), "centred": pooled_isotropy(rows, centred=True)}
    return found


@functools.partial(jax.jit, static_argnums=0)
def _states(model: Decoder, params: Any, tokens: jax.Array) -> tuple[dict[int, jax.Array], jax.Array]:
    """Returns the residual streams behind all layers, and the last one under the final norm."""

    def through(module: Decoder, tokens: jax.Array) -> tuple[dict[int, jax.Array], jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        layers = tuple(range(1, model.config.num_layers + 1))
        x, hidden, _, _ = module.layers(module.embed(tokens, positions), positions, collect=layers)
        return hidden, module.normed(x)

    return model.apply({"params": params}, tokens, method=through)
