"""A table of tri-grams: which tokens followed a pair of tokens, and with what weight. ADED drafts from it.

Source: "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (ADED, also Adaptix; 2407.12021). The
table may start from a corpus (`count_trigrams`) and is nudged towards the text as it grows (`learn`). Once nudged a
weight is no probability: nothing decays, and nothing is normalised again.

Deviations from the released code: its table is a hash map that grows for ever; here it has a fixed number of slots, a
pair has one slot, and a newer pair drives out the older one. A pair keeps 12 successors for good, where the code only
starts with 12 of them: a new one takes the place of the lightest. Successors are sorted by (-weight, id), where the
code goes by the order of its hash maps. All rows of a batch read and teach one table, in their order.

Axis letters: B batch, N slots, C successors per pair, X pairs, K tokens of a text's end.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.errors import InputError

NUM_SUCCESSORS = 12
WINDOW = 16  # tokens at the end of a text that teach the table
GROWTH, CAP = 0.04, 3.0
DEFAULT_SLOTS = 1 << 16
_MOST_SLOTS = 1 << 24


@struct.dataclass
class Trigrams:
    """The table.

    Attributes:
        pairs: i32[N, 2], the pair that holds a slot; -1 where it is free.
        tokens: i32[N, C], the pair's successors, in no order.
        weights: f32[N, C], their weights; 0 where there is none.
    """

    pairs: jax.Array
    tokens: jax.Array
    weights: jax.Array


def empty_table(slots: int, vocab_size: int) -> Trigrams:
    """Returns a table that knows nothing, as NumPy arrays."""
    successors = min(NUM_SUCCESSORS, vocab_size)
    tokens, weights = np.zeros((slots, successors), np.int32), np.zeros((slots, successors), np.float32)
    return Trigrams(np.full((slots, 2), -1, np.int32), tokens, weights)


def check_slots(slots: int) -> None:
    """Raises InputError unless `slots` is a power of two within bounds."""
    if not 2 <= slots <= _MOST_SLOTS or slots & (slots - 1):
        raise InputError(f"slots must be a power of two, 2 to {_MOST_SLOTS}, got {slots}")


def slot_of(pairs: jax.Array, slots: int) -> jax.Array:
    """Returns i32[...], the slot of each pair i32[..., 2]."""
    first, second = pairs[..., 0].astype(jnp.uint32), pairs[..., 1].astype(jnp.uint32)
    mixed = (first * jnp.uint32(0x9E3779B1)) ^ (second * jnp.uint32(0x85EBCA6B))
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return ((mixed ^ (mixed >> 13)) & jnp.uint32(slots - 1)).astype(jnp.int32)


def look_up(table: Trigrams, pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the successors of pairs i32[..., 2]: tokens i32[..., C] and weights f32[..., C], by (-weight, id).

    Token -1 and weight 0 stand where there are fewer; a pair with a token of -1 has none.
    """
    slot = slot_of(pairs, len(table.pairs))
    known = jnp.all(table.pairs[slot] == pairs, axis=-1, keepdims=True)
    weights = jnp.where(known, table.weights[slot], 0.0)
    tokens = jnp.where(weights > 0, table.tokens[slot], -1)
    negative, tokens = jax.lax.sort((-weights, tokens), num_keys=2)
    return tokens, -negative


def learn(table: Trigrams, window: jax.Array, active: jax.Array) -> Trigrams:
    """Returns the table after one update: every tri-gram of the window weighs 0.04 more, 3 at most.

    Tri-grams are added one after the other, from a row's first to its last and from row to row, so that one that
    stands in the window twice counts twice.

    Args:
        table: the table before.
        window: i32[B, K], the last tokens of each row, -1 before a text begins.
        active: bool[B], rows that teach.
    """
    size = window.shape[1]
    trigrams = jnp.stack([window[:, place : size - 2 + place] for place in range(3)], axis=-1)
    real = (trigrams[..., 0] >= 0) & active[:, None]
    trigrams, real = trigrams.reshape(-1, 3), real.reshape(-1)
    order = jnp.argsort(~real, stable=True)

    def add(index: jax.Array, table: Trigrams) -> Trigrams:
        trigram = trigrams[order[index]]
        slot = slot_of(trigram[:2], len(table.pairs))
        held = jax.tree.map(lambda x: x[slot], table)
        known = jnp.all(held.pairs == trigram[:2])
        weights = jnp.where(known, held.weights, 0.0)
        same = (held.tokens == trigram[2]) & (weights > 0)
        place = jnp.where(same.any(), jnp.argmax(same), jnp.argmin(weights))
        weight = jnp.minimum(jnp.where(same.any(), weights[place], 0.0) + GROWTH, CAP)
        return Trigrams(
            table.pairs.at[slot].set(jnp.where(known, held.pairs, trigram[:2])),  # read before written: no copy
            table.tokens.at[slot, place].set(trigram[2]),
            table.weights.at[slot].set(weights.at[place].set(weight)),
        )

    return jax.lax.fori_loop(0, real.sum(), add, table)


def count_trigrams(texts: Sequence[Sequence[int]], vocab_size: int, slots: int = DEFAULT_SLOTS) -> Trigrams:
    """Returns a table to start from: `decode_fn(params, prompts, warm=count_trigrams(texts, vocab_size))`.

    A weight is the share of its successor among all tri-grams of the pair; the 12 heaviest are kept, ties by smaller
    id, and not normalised again. Of pairs that meet in a slot the most frequent one stays.

    Args:
        texts: lists of token ids by the target's own tokenizer, without BOS and EOS.
        vocab_size: of the target, `model.config.vocab_size`.
        slots: as in the options of the method.

    Raises:
        InputError: ids outside the vocabulary, or a number of slots that cannot be.
    """
    check_slots(slots)
    codes = [np.zeros(0, np.int64), *(_codes(index, text, vocab_size) for index, text in enumerate(texts))]
    codes, counts = np.unique(np.concatenate(codes), return_counts=True)
    pair_codes, pair = np.unique(codes // vocab_size, return_inverse=True)
    pairs = np.stack([pair_codes // vocab_size, pair_codes % vocab_size], axis=1).astype(np.int32)
    totals = np.zeros(len(pairs), np.int64)
    np.add.at(totals, pair, counts)
    order = np.lexsort((codes, -counts, pair))
    rank = np.arange(len(codes)) - np.searchsorted(pair, pair)  # `pair` is sorted, and stays so in this order

    slot = np.asarray(slot_of(jnp.asarray(pairs), slots))
    owner = np.full(slots, -1)
    rising = np.argsort(totals, kind="stable")
    owner[slot[rising]] = rising  # the last one stays
    table = empty_table(slots, vocab_size)
    stays = (owner[slot[pair]] == pair) & (rank < table.tokens.shape[1])
    where = slot[pair][stays], rank[stays]
    table.pairs[owner >= 0] = pairs[owner[owner >= 0]]
    table.tokens[where] = (codes % vocab_size)[order][stays]
    table.weights[where] = (counts / totals[pair])[order][stays]
    return table


def _codes(index: int, text: Sequence[int], vocab_size: int) -> np.ndarray:
    """Returns i64[X], each tri-gram of a text as one number."""
    row = np.asarray(text)
    if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
        raise InputError(f"text {index} must be a list of token ids, got {text!r:.80}: encode it first")
    for token in (row.min(), row.max()) if row.size else ():
        if not 0 <= token < vocab_size:
            raise InputError(
                f"text {index} has token id {token}, but the model has ids 0 to {vocab_size - 1}: was it encoded "
                "with another model's tokenizer?"
            )
    row = row.astype(np.int64)
    return (row[:-2] * vocab_size + row[1:-1]) * vocab_size + row[2:]
