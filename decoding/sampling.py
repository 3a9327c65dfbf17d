"""From logits to a token's law, and a draw from it: one `process_logits` for target and draft models alike.

Everything that users vary between calls is an array, one number per row, so that no new value compiles anything. A
row's randomness is folded from (seed, tokens emitted so far) and does not depend on who shares its batch.

Axis letters: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import struct

from decoding.thresholds import highest, ordered

_BLOCK = 256
_TOP_BLOCK = 64


@struct.dataclass
class Sampling:
    """How each row samples.

    Attributes:
        temperature: f32[B], >= 0; 0 takes the most likely token.
        top_k: i32[B]; keep the k most likely tokens (ties with the k-th stay). 0 keeps all.
        top_p: f32[B] in (0, 1]; keep the smallest set of most likely tokens with at least this mass (nucleus,
            1904.09751). 1 keeps all.
        min_p: f32[B] in [0, 1]; keep tokens with at least this share of the most likely one's probability (2407.01082).
            0 keeps all.
        repetition_penalty: f32[B], 0.01 to 100; divides positive and multiplies negative logits of tokens that occur in
            prompt or output (CTRL, 1909.05858, section 4.1, in the signed form in common use). 1 changes nothing.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def process_logits(logits: jax.Array, sampling: Sampling, seen: jax.Array) -> jax.Array:
    """Returns the logits of the law to sample from: penalty, temperature, top-k, top-p, min-p, in this order.

    Args:
        logits: f32[B, V].
        sampling: one setting per row.
        seen: bool[B, V], tokens that occur in the row's prompt or output.

    Returns:
        f32[B, V], 0 for the most likely token and -inf for tokens that may not be drawn. At temperature 0 only the most
        likely tokens stay.
    """
    penalty = sampling.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
    logits = logits - logits.max(axis=-1, keepdims=True)
    temperature = sampling.temperature[:, None]
    logits = jnp.where(temperature > 0, logits / jnp.where(temperature > 0, temperature, 1.0), logits)
    keep_all = jnp.full_like(logits, True, dtype=bool)
    kept = jax.lax.cond(jnp.any(sampling.top_k > 0), lambda: _top_k(logits, sampling.top_k), lambda: keep_all)
    logits = jnp.where(kept, logits, -jnp.inf)
    kept = jax.lax.cond(jnp.any(sampling.top_p < 1), lambda: _top_p(logits, sampling.top_p), lambda: keep_all)
    logits = jnp.where(kept, logits, -jnp.inf)
    margin = jnp.where(temperature > 0, -jnp.log(sampling.min_p[:, None]), 0.0)
    return jnp.where(-logits <= margin, logits, -jnp.inf)


def probabilities(logits: jax.Array, sampling: Sampling, seen: jax.Array) -> jax.Array:
    """Returns the law to sample from, f32[B, V]; at temperature 0 all of it is on the first of the most likely tokens.

    See `process_logits` for the arguments.
    """
    logits = process_logits(logits, sampling, seen)
    one_hot = jax.nn.one_hot(likeliest(logits), logits.shape[-1], dtype=jnp.float32)
    return jnp.where(sampling.temperature[:, None] > 0, jax.nn.softmax(logits, axis=-1), one_hot)


def likeliest(logits: jax.Array) -> jax.Array:
    """Returns the most likely token, i32[...], of f32[..., V]; the first one on a tie."""
    return top_tokens(logits, 1)[..., 0]


def top_tokens(logits: jax.Array, k: int) -> jax.Array:
    """Returns the k most likely tokens of f32[..., V], most likely first, i32[..., k]: what `lax.top_k` does, faster.

    The k best lie in the k blocks with the highest maxima, so that all but these blocks need no more than a maximum.
    """
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    if vocab < 2 * k * _TOP_BLOCK:
        return jax.lax.top_k(logits, k)[1]
    padding = [(0, 0)] * len(shape) + [(0, -vocab % _TOP_BLOCK)]
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf).reshape(*shape, -1, _TOP_BLOCK)
    best = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), k)[1], axis=-1)
    inside = jnp.take_along_axis(blocks, best[..., None], axis=-2).reshape(*shape, -1)
    place = jax.lax.top_k(inside, k)[1]
    return jnp.take_along_axis(best, place // _TOP_BLOCK, axis=-1) * _TOP_BLOCK + place % _TOP_BLOCK


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws one token per row, i32[B], from f32[B, V] logits with one key per row.

    Inverts the cumulative distribution at one uniform number: first over blocks of the vocabulary, then inside a block.
    One random number a row is enough, where Gumbel noise takes one for every entry. A token of probability 0 is never
    drawn.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    padding = -logits.shape[-1] % _BLOCK
    blocks = jnp.pad(probabilities, ((0, 0), (0, padding))).reshape(logits.shape[0], -1, _BLOCK)
    ends = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    target = jax.vmap(jax.random.uniform)(keys) * ends[:, -1]
    block = _first_above(ends, target, jnp.any(blocks > 0, axis=-1))
    rows = jnp.arange(logits.shape[0])
    start = jnp.where(block > 0, ends[rows, block - 1], 0.0)
    inside = blocks[rows, block]
    token = block * _BLOCK + _first_above(jnp.cumsum(inside, axis=-1), target - start, inside > 0)
    return jnp.minimum(token, logits.shape[-1] - 1)  # stays an id even where the logits are no numbers


def _first_above(ends: jax.Array, target: jax.Array, possible: jax.Array) -> jax.Array:
    """Returns, i32[B], the first index whose end (f32[B, X]) exceeds target (f32[B]); the last possible one if none."""
    above = (ends > target[:, None]) & possible
    last = possible.shape[1] - 1 - jnp.argmax(possible[:, ::-1], axis=1)
    return jnp.where(above.any(axis=1), jnp.argmax(above, axis=1), last).astype(jnp.int32)


def row_keys(rng: jax.Array, batch: int) -> jax.Array:
    """Returns one key per row: a scalar key is folded with the row's index, a [B] array of keys is used as it is."""
    if rng.ndim == 0:
        return jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(batch))
    return rng


def step_keys(keys: jax.Array, step: jax.Array) -> jax.Array:
    """Returns each row's key for its step (i32[B], tokens emitted so far)."""
    return jax.vmap(jax.random.fold_in)(keys, step)


def _top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
    """bool[B, V]: the k highest logits of each row, ties with the k-th included."""
    k = jnp.where(k > 0, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])
    bits = ordered(logits)
    threshold = highest(lambda t: jnp.sum(bits >= t, axis=-1, keepdims=True) >= k[:, None], (len(k), 1))
    return bits >= threshold


def _top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """bool[B, V]: the most likely tokens that together have mass p, ties with the last included."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = ordered(probabilities)

    def reaches_p(t):
        return jnp.sum(jnp.where(bits >= t, probabilities, 0.0), axis=-1, keepdims=True) >= p[:, None]

    kept = (bits >= highest(reaches_p, (len(p), 1))) | (p >= 1)[:, None]
    return kept | (bits == bits.max(axis=-1, keepdims=True))
