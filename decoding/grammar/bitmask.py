"""Sets of tokens as bits, 32 to a word: bit i % 32 of word i // 32 stands for token i.

Axis letters: B batch, V vocabulary, W words, ceil(V / 32).
"""

import jax
import jax.numpy as jnp
import numpy as np


def num_words(vocab: int) -> int:
    """Returns W."""
    return -(-vocab // 32)


def pack(allowed: np.ndarray) -> np.ndarray:
    """Returns u32[..., W] of bool[..., V]."""
    padding = [(0, 0)] * (allowed.ndim - 1) + [(0, -allowed.shape[-1] % 32)]
    packed = np.packbits(np.pad(allowed, padding), axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32)


def unpack(words: jax.Array, vocab: int) -> jax.Array:
    """Returns bool[B, V] of u32[B, W]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab] > 0


def mask_logits(logits: jax.Array, words: jax.Array, ends: jax.Array, stop_tokens: tuple[int, ...]) -> jax.Array:
    """Returns logits f32[B, V] with -inf for tokens that a row may not take next.

    Args:
        logits: f32[B, V].
        words: u32[B, W], the tokens allowed; what it says of stop tokens does not count.
        ends: bool[B], whether the text may end here, so that stop tokens are allowed. They are, too, where nothing else
            is, so that a row with no way on ends.
        stop_tokens: ids that end a row.
    """
    vocab = logits.shape[-1]
    stops = np.zeros(vocab, bool)
    stops[list(stop_tokens)] = True
    allowed = unpack(words, vocab) & ~stops[None, :]
    ends = ends | ~allowed.any(axis=-1)
    return jnp.where(allowed | (ends[:, None] & stops[None, :]), logits, -jnp.inf)
