"""What a model's next-token laws are like over given texts: entropy, mass on the likeliest token, cross-entropy.

And the temperature at which one model's laws are as sharp as another's.

Sharper laws alone make better samples. So a method that sharpens a model (EMO, 2310.04691; hyperfitting, 2412.04318) is
held against the plain model sampled at the temperature of `match_entropy`.

Laws are those that plain sampling draws from, rows that pad a vocabulary included.

Axis letters: B batch, T padded length, N places of a chunk, D width, V vocabulary, K temperatures.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.entropy_adaptive import entropy
from decoding.prefill import Prompts, pad_prompts
from models.decoder import Decoder
from models.errors import InputError

_CHUNK = 256  # places whose logits exist at a time
_GRID, _ROUNDS = 9, 3  # of the search: 9 temperatures at a time, each round inside one step of the last


@struct.dataclass
class LawFigures:
    """Means over all counted tokens, at each temperature.

    Attributes:
        entropy: f32[K], bits, of the laws that the tokens were predicted by.
        top_mass: f32[K], probability of the likeliest token.
        cross_entropy: f32[K], nats, -log of the tokens' own probability. At temperature 1 its exponential is the
            perplexity of a text; of a continuation under another model it is the negative of what 2210.14140 calls
            coherence.
    """

    entropy: np.ndarray
    top_mass: np.ndarray
    cross_entropy: np.ndarray


def law_figures(
    model: Decoder,
    params: Any,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int] | int = 1,
    temperatures: Sequence[float] = (1.0,),
    batch_size: int = 8,
) -> LawFigures:
    """Reads texts and measures the laws behind each place.

    Args:
        model: the network.
        params: its parameters.
        texts: lists of token ids.
        starts: the first token of each text that counts, at least 1: the length of a prompt that is read but not
            measured. One number serves all texts.
        temperatures: all above 0.
        batch_size: texts read together.

    Raises:
        InputError: no tokens to measure, a token that the model has no embedding for, or a setting out of range.
    """
    starts = np.broadcast_to(np.asarray(starts, np.int32), len(texts))
    if min(temperatures) <= 0 or starts.min(initial=1) < 1:
        raise InputError(f"temperatures must be above 0 and starts at least 1, got {temperatures} and {starts.min()}")
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    total, count = np.zeros((3, len(temperatures))), 0
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        unused = batch_size - len(rows)  # rows of one token, which nothing predicts
        batch = pad_prompts([*(texts[row] for row in rows), *([[0]] * unused)], model.config.vocab_size)
        begin = jnp.asarray([*starts[rows], *([1] * unused)], jnp.int32)
        total += np.asarray(_summed(model, params, batch, begin, jnp.asarray(temperatures, jnp.float32)), np.float64)
        count += sum(max(len(texts[row]) - int(starts[row]), 0) for row in rows)
    if not count:
        raise InputError("no token to measure: texts must be longer than what is read before them")
    return LawFigures(*(total / count).astype(np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _summed(model: Decoder, params: Any, texts: Prompts, starts: jax.Array, temperatures: jax.Array) -> jax.Array:
    """Returns f32[3, K]: the sums of the three figures over the tokens from `starts` on."""
    places = jnp.arange(1, texts.tokens.shape[1])[None, :]
    counted = (places >= starts[:, None]) & (places < texts.lengths[:, None])
    x = model.apply({"params": params}, jnp.asarray(texts.tokens), method=_last_residual)[:, :-1]
    rows = (x.reshape(-1, x.shape[-1]), jnp.asarray(texts.tokens)[:, 1:].reshape(-1), counted.reshape(-1))
    size = min(_CHUNK, len(rows[2]))
    short = -len(rows[2]) % size
    chunks = [jnp.pad(row, [(0, short)] + [(0, 0)] * (row.ndim - 1)).reshape(-1, size, *row.shape[1:]) for row in rows]

    def of_chunk(chunk):
        x, labels, counted = chunk
        logits = model.apply({"params": params}, x, method="unembed")

        def at(temperature):
            log_law = jax.nn.log_softmax(logits / temperature, axis=-1)
            own = jnp.take_along_axis(log_law, labels[:, None], axis=-1)[:, 0]
            figures = jnp.stack([entropy(log_law), jnp.exp(log_law.max(axis=-1)), -own])
            return jnp.sum(jnp.where(counted[None, :], figures, 0.0), axis=1)

        return jax.lax.map(at, temperatures)

    return jax.lax.map(of_chunk, tuple(chunks)).sum(axis=0).T


def _last_residual(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Returns the residual stream after the last block, [B, T, D]; what stands behind a text is not seen by it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    return model.layers(model.embed(tokens, positions), positions)[0]


def match_entropy(
    model: Decoder,
    params: Any,
    texts: Sequence[Sequence[int]],
    wanted: float,
    starts: Sequence[int] | int = 1,
    *,
    lowest: float = 0.05,
    highest: float = 5.0,
    batch_size: int = 8,
) -> float:
    """Returns the temperature at which a model's laws over texts have a mean entropy of `wanted` bits.

    Mean entropy rises with temperature. Each pass over the texts measures a grid of temperatures, as a model takes
    longer to read them than to make its laws sharper; the next pass looks between the two nearest.

    Args:
        model: the network.
        params: its parameters.
        texts: as in `law_figures`; best the same that `wanted` was measured on.
        wanted: bits.
        starts: as in `law_figures`.
        lowest: the lowest temperature looked at.
        highest: the highest one.
        batch_size: texts read together.

    Raises:
        InputError: no temperature between the two gives that entropy, or what `law_figures` raises.
    """
    low, high = lowest, highest
    for turn in range(_ROUNDS):
        temperatures = np.geomspace(low, high, _GRID)
        found = law_figures(model, params, texts, starts, temperatures.tolist(), batch_size).entropy
        if turn == 0 and not found[0] <= wanted <= found[-1]:
            raise InputError(
                f"no temperature from {low:.3g} to {high:.3g} gives a mean entropy of {wanted:.4g} bits: these texts "
                f"have {found[0]:.4g} to {found[-1]:.4g}"
            )
        above = int(np.clip(np.searchsorted(found, wanted), 1, _GRID - 1))
        low, high = temperatures[above - 1], temperatures[above]
    return float(np.interp(wanted, found[above - 1 : above + 1], [low, high]))
