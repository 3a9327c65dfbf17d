"""The losses of CodeT5+ (2305.07922, section 3), each a function of what it reads.

Axis letters: B rows, S tokens that are read, T tokens that are written, K entries of the queue, N answers, E width of a
vector, D model width, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from finetune.momentum import Queue, Vectors
from finetune.objectives import label_scores
from finetune.trainer import LOSS_CHUNK, columns, sum_over_chunks
from models.encoder_decoder import EncoderDecoder


class Text(NamedTuple):
    """Texts: tokens i32[B, T], 0 from `lengths` on, and lengths i32[B]; 0 where a row of the batch is empty."""

    tokens: Any
    lengths: Any


def behind(first: int, text: Text) -> Text:
    """Returns texts with a token in front, [B, T + 1]."""
    return Text(jnp.pad(text.tokens, ((0, 0), (1, 0)), constant_values=first), text.lengths + 1)


def writing_loss(model: EncoderDecoder, params: Any, source: Text, target: Text, first: int) -> jax.Array:
    """Returns the cross-entropy f32[] of the target's tokens, on average, behind the token `first`."""
    encoded = model.apply({"params": params}, source.tokens, jnp.maximum(source.lengths, 1), method="encode")
    before = behind(first, target).tokens[:, :-1]
    x = model.apply({"params": params}, before, encoded, method="written")
    wanted = jnp.arange(before.shape[1])[None, :] < target.lengths[:, None]
    x, *rest = columns((x, target.tokens, wanted), max(1, LOSS_CHUNK // len(before)))

    def of(head: Any, x: jax.Array, rest: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        labels, wanted = (value.reshape(-1) for value in rest)
        logits = model.apply({"params": {"decoder": head}}, x.reshape(-1, x.shape[-1]), method="unembed")
        value = jax.nn.logsumexp(logits, axis=-1) - label_scores(logits, labels)
        return jnp.sum(jnp.where(wanted, value, 0.0)), {}

    head = {name: value for name, value in params["decoder"].items() if not name.startswith("layers_")}
    total, _ = sum_over_chunks(of, head, x, tuple(rest))
    return total / jnp.maximum(jnp.sum(target.lengths), 1).astype(jnp.float32)


def contrastive_loss(
    texts: jax.Array, codes: jax.Array, slow: Vectors, queue: Queue, temperature: float
) -> dict[str, jax.Array]:
    """Returns {"contrastive": the loss, "recall": share of texts whose own function is the most alike}, f32[].

    Half the cross-entropy from texts to functions, half that from functions to texts; the right answer is the row's
    own, as the slow encoder sees it, among those of the batch and of the queue. Entries with an equal text or an equal
    function, and rows that are empty, are none of the answers.

    Args:
        texts: f32[B, E] of the trained encoder, of length 1.
        codes: f32[B, E].
        slow: the same rows by the slow encoder; no gradient reaches them.
        queue: of earlier rows.
        temperature: of the softmax.
    """
    slow, queue = jax.lax.stop_gradient((slow, queue))
    keys = jnp.concatenate([slow.keys, queue.keys])
    there = jnp.concatenate([slow.valid, queue.filled])
    own = jnp.arange(len(keys))[None, :] == jnp.arange(len(texts))[:, None]
    shown = own | (there[None, :] & ~equal_pairs(slow.keys, keys))

    def side(mine: jax.Array, answers: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.where(shown, mine @ answers.T / temperature, -jnp.inf)
        losses = jax.nn.logsumexp(scores, axis=-1) - jnp.sum(jnp.where(own, scores, 0.0), axis=-1)
        return mean(losses, slow.valid), mean(jnp.argmax(scores, -1) == jnp.arange(len(mine)), slow.valid)

    by_text, recall = side(texts, jnp.concatenate([slow.codes, queue.codes]))
    by_code, _ = side(codes, jnp.concatenate([slow.texts, queue.texts]))
    return {"contrastive": 0.5 * (by_text + by_code), "recall": recall}


def equal_pairs(keys: jax.Array, others: jax.Array) -> jax.Array:
    """Returns bool[B, N]: whether pairs with keys i32[B, 2] and i32[N, 2] have an equal text or an equal function."""
    return jnp.any(keys[:, None, :] == others[None, :, :], axis=-1)


def draw_negatives(likeness: jax.Array, allowed: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (i32[B], bool[B]): one wrong answer for each row, and whether there is any.

    Args:
        likeness: f32[B, N]; answer j is drawn with a chance that goes with exp(likeness).
        allowed: bool[B, N]: which answers are wrong ones.
        key: of the draw.
    """
    some = jnp.any(allowed, axis=-1)
    return jax.random.categorical(key, jnp.where(allowed, likeness, -jnp.inf), axis=-1).astype(jnp.int32), some


class WrongPairs(NamedTuple):
    """For each row a wrong function and a wrong text, rows of the batch i32[B], and whether there is one, bool[B]."""

    code: jax.Array
    some_code: jax.Array
    text: jax.Array
    some_text: jax.Array


def wrong_pairs(likeness: jax.Array, rows: Vectors, key: jax.Array) -> WrongPairs:
    """Draws wrong functions for all texts, and wrong texts for all functions, by f32[B, B], texts to functions."""
    allowed = rows.valid[None, :] & rows.valid[:, None] & ~equal_pairs(rows.keys, rows.keys)
    first, second = jax.random.split(key)
    return WrongPairs(*draw_negatives(likeness, allowed, first), *draw_negatives(likeness.T, allowed.T, second))


def matching_loss(
    model: EncoderDecoder,
    params: Any,
    read: jax.Array,
    lengths: jax.Array,
    code: Text,
    rows: Vectors,
    wrong: WrongPairs,
) -> dict[str, jax.Array]:
    """Returns {"match": cross-entropy, "matched": share of right answers} over right pairs and two wrong ones each.

    Args:
        model: with a head that matches.
        params: its parameters.
        read: [B, S, D], the encoder's output for the texts.
        lengths: i32[B], tokens of these.
        code: the functions behind their task's token, the end of text last.
        rows: which count.
        wrong: pairs that do not belong together.
    """
    own, valid = jnp.arange(len(lengths), dtype=jnp.int32), rows.valid
    of_text, of_code = jnp.concatenate([own, own, wrong.text]), jnp.concatenate([own, wrong.code, own])
    counted = jnp.concatenate([valid, valid & wrong.some_code, valid & wrong.some_text])
    labels = (jnp.arange(len(counted)) < len(own)).astype(jnp.int32)
    encoded = model.apply({"params": params}, read[of_text], lengths[of_text], method="attended")
    logits = model.apply({"params": params}, code.tokens[of_code], code.lengths[of_code], encoded, method="match")
    losses = jax.nn.logsumexp(logits, axis=-1) - label_scores(logits, labels)
    return {"match": mean(losses, counted), "matched": mean(jnp.argmax(logits, -1) == labels, counted)}


def mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns the mean f32[] of values [N] where `counted`; 0 where nothing is."""
    total = jnp.sum(jnp.where(counted, values.astype(jnp.float32), 0.0))
    return total / jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
