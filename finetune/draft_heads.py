"""Training of heads that draft: one loss, one update, one file for every kind (`decoding.speculative.draft_head`).

A head turns hidden states of the target, read from files (`finetune.hidden_store`), into what the target's unembedding
turns into guesses. The target is read and never changed. The loss of offset k, weighted with decay^k, is a sum of

    hard      cross-entropy with the token that the text has there (Medusa, 2401.10774, section 2.2)
    soft      cross-entropy with the target's own law there (distillation)
    feature   smooth L1 distance to what the unembedding reads there, over its mean magnitude (EAGLE, 2401.15077)

With `vocabulary: seen` softmaxes run over the tokens that occur in the texts to train on: a tenth of the time, where
the vocabulary is large. Drafts are always made with all tokens, and text is the target's own whatever a head says.

Axis letters: B rows, T tokens of a row, K offsets, D width, V vocabulary, C chunk.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from decoding.speculative.draft_head import HeadKind, Reading, normed, scores
from finetune.rows import Rows
from finetune.state import Batch, TrainState
from finetune.trainer import LOSS_CHUNK, Metrics, columns, sum_over_chunks
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import as_kernel


@dataclasses.dataclass(frozen=True)
class HeadLoss:
    """What is minimised.

    Attributes:
        decay: the weight of an offset over that of the one before it.
        hard: weight of the cross-entropy with the text.
        soft: weight of the cross-entropy with the target's law.
        feature: weight of the distance to the target's features.
        vocabulary: whether softmaxes run over the tokens of the texts, or over all.
        places: tokens of a row that an update guesses from, drawn at random; None: all.
    """

    decay: float = 0.8
    hard: float = 1.0
    soft: float = 0.0
    feature: float = 0.0
    vocabulary: Literal["seen", "all"] = "seen"
    places: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise InputError(f"decay must be above 0 and at most 1, got {self.decay}")
        if min(self.hard, self.soft, self.feature) < 0 or not self.hard + self.soft + self.feature > 0:
            raise InputError(
                f"hard, soft and feature must not be negative, and not all 0; got {self.hard}, {self.soft}, "
                f"{self.feature}"
            )
        if self.places is not None and self.places < 1:
            raise InputError(f"places must be at least 1 (or null for all tokens), got {self.places}")


@struct.dataclass
class HeadBatch:
    """Rows of an update: what the head reads, and bool[B, T], the tokens that the model wrote."""

    reading: Reading
    targets: jax.Array


class HeadConstants(NamedTuple):
    """What every update reads: the target's parameters, those of its unembedding for the softmax's tokens, and
    i32[V], each token's place among these.
    """

    params: Any
    unembedding: Any
    place: jax.Array


class HeadTrainer(NamedTuple):
    """What is trained on what: the kind of head, its settings, the target, and the one whose unembedding the loss uses.

    `unembedder` is the target with a vocabulary of its own.
    """

    kind: HeadKind
    config: Any
    model: Decoder
    unembedder: Decoder
    loss: HeadLoss


def make_trainer(
    kind: HeadKind, config: Any, model: Decoder, params: Any, loss: HeadLoss, tokens: np.ndarray
) -> tuple[HeadTrainer, HeadConstants]:
    """Returns what updates need; `tokens` (i[N]) are those of the texts to train on."""
    vocab = model.config.vocab_size
    if loss.vocabulary == "all":
        return HeadTrainer(kind, config, model, model, loss), HeadConstants(params, params, jnp.arange(vocab))
    ids = np.unique(tokens)
    place = np.zeros(vocab, np.int32)
    place[ids] = np.arange(len(ids))
    unembedder = Decoder(dataclasses.replace(model.config, vocab_size=len(ids)))
    kept = {"embedding": {"embedding": params["embedding"]["embedding"][:, ids]}}
    if not model.config.tied_embeddings:
        kept["unembedding"] = {"kernel": as_kernel(params["unembedding"]["kernel"]).materialize()[:, ids]}
    return HeadTrainer(kind, config, model, unembedder, loss), HeadConstants(params, kept, jnp.asarray(place))


def index_rows(rows: Rows, chosen: np.ndarray) -> Rows:
    """Returns some rows with each token's number among all tokens in place of the token: what a `Batches` can be of."""
    spans = [np.arange(rows.starts[row], rows.starts[row + 1]) for row in chosen]
    if not spans:
        raise InputError("no texts to make batches of")
    index = np.concatenate(spans).astype(np.int32)
    starts = np.cumsum([0, *(len(span) for span in spans)], dtype=np.int64)
    return Rows(index, rows.targets[index], starts, np.zeros(0, np.int32), np.zeros_like(starts))


def filled(batch: Batch, rows: Rows, hidden: dict[int, np.ndarray]) -> HeadBatch:
    """Returns the texts that a batch of one micro-batch of token numbers stands for."""
    index, segments, positions, targets = (x[0] for x in (batch.tokens, batch.segments, batch.positions, batch.targets))
    streams = {layer: values[index] for layer, values in hidden.items()}
    return HeadBatch(Reading(rows.tokens[index], positions, segments, streams), targets)


def at_random_places(batch: HeadBatch, offsets: int, count: int, seed: tuple[int, ...]) -> HeadBatch:
    """Returns the batch with `count` places of each row to guess from, drawn among those that all offsets can be
    guessed from; all of these where there are no more.
    """
    wanted = np.asarray(offsets_ahead(batch, offsets)[1]).all(axis=-1)
    keys = np.where(wanted, np.random.default_rng(seed).random(wanted.shape), 2.0)
    places = np.argsort(keys, axis=1)[:, :count].astype(np.int32)
    places = np.where(np.take_along_axis(wanted, places, axis=1), places, -1)
    return batch.replace(reading=batch.reading._replace(places=places))


def ahead(x: jax.Array, steps: int) -> jax.Array:
    """Returns [B, T, ...] with entry t that of t + steps; what comes from behind the end is zero."""
    padding = [(0, 0), (0, steps)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding)[:, steps:]


def offsets_ahead(batch: HeadBatch, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns (i32[B, T, K] the tokens to guess, bool[B, T, K] whether they are to be guessed from there).

    Behind token t, token t + 1 is known and t + 2 + k guessed, both written by the model and both of the same text.
    Where the reading names places, [B, M, K] of these.
    """
    tokens, segments = batch.reading.tokens, batch.reading.segments
    known = ahead(batch.targets, 1) & (ahead(segments, 1) == segments) & (segments > 0)
    labels = [ahead(tokens, 2 + k) for k in range(count)]
    wanted = [known & ahead(batch.targets, 2 + k) & (ahead(segments, 2 + k) == segments) for k in range(count)]
    found = [batch.reading.at_places(jnp.stack(x, axis=-1)) for x in (labels, wanted)]
    if batch.reading.places is not None:
        found[1] &= batch.reading.places[..., None] >= 0
    return tuple(found)


def _guessed(trainer: HeadTrainer, params: Any, values: Any, batch: HeadBatch) -> tuple[HeadBatch, jax.Array]:
    """Returns the batch in the target's dtype, and f32[B, T, K, D]."""
    dtype = params["embedding"]["embedding"].dtype
    streams = jax.tree.map(lambda x: x.astype(dtype), batch.reading.hidden)
    batch = batch.replace(reading=batch.reading._replace(hidden=streams))
    found = trainer.kind.guesses(trainer.config, trainer.model, params, values, batch.reading)
    found = found if trainer.kind.some else batch.reading.at_places(found)
    return batch, found.astype(jnp.float32)


def head_loss(trainer: HeadTrainer, constants: HeadConstants, values: Any, batch: HeadBatch) -> tuple[Any, Metrics]:
    """Returns the loss f32[], a mean over places, and each offset's cross-entropy with the text."""
    settings, count = trainer.loss, trainer.config.offsets
    batch, y = _guessed(trainer, constants.params, values, batch)
    labels, wanted = offsets_ahead(batch, count)
    truth = None
    if settings.soft or settings.feature:
        f = normed(trainer.model, constants.params, batch.reading.hidden[trainer.model.config.num_layers])
        truth = jnp.stack([batch.reading.at_places(ahead(f, 1 + k)) for k in range(count)], axis=2)
        truth = jax.lax.stop_gradient(truth)
    weights = settings.decay ** np.arange(count, dtype=np.float32)

    def of(_, y, rest):
        value, figures = _per_guess(trainer, constants, y, *rest)
        kept = jax.tree.map(lambda x: jnp.sum(jnp.where(rest[1], x, 0.0), axis=(0, 1)), (value, figures))
        return jnp.sum(kept[0] * weights), kept[1]

    width = max(1, LOSS_CHUNK // len(labels))
    y, *rest = columns((y, constants.place[labels], wanted, truth), min(width, labels.shape[1]))
    total, figures = sum_over_chunks(of, {}, y, tuple(rest))
    places = jnp.maximum(jnp.sum(wanted, axis=(0, 1)).astype(jnp.float32), 1.0)
    split = {f"cross_entropy_{k + 1}": figures[k] / places[k] for k in range(count)}
    return total / places[0], split | {"tokens": places[0]}


def _per_guess(
    trainer: HeadTrainer, constants: HeadConstants, y: jax.Array, labels: jax.Array, wanted: jax.Array, truth: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns (the loss, the cross-entropy with the text) of each guess, f32[B, C, K]."""
    settings = trainer.loss
    logits = scores(trainer.unembedder, constants.unembedding, y)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    hard = log_z - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    value = settings.hard * hard
    if settings.soft:
        law = jax.nn.softmax(scores(trainer.unembedder, constants.unembedding, truth), axis=-1)
        value += settings.soft * (log_z - jnp.sum(law * logits, axis=-1))
    if settings.feature:
        distance = optax.huber_loss(y, truth).mean(axis=-1)
        scale = jnp.abs(truth).mean(where=wanted[..., None])
        value += settings.feature * distance / jnp.where(scale > 0, scale, 1.0)
    return value, hard


def make_head_step(
    trainer: HeadTrainer, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, HeadConstants, HeadBatch], tuple[TrainState, Metrics]]:
    """Returns the jitted update, in the form of `finetune.trainer.make_train_step`'s: the old state is given up."""

    def train_step(state: TrainState, constants: HeadConstants, batch: HeadBatch) -> tuple[TrainState, Metrics]:
        def of(values):
            return head_loss(trainer, constants, values, batch)

        (loss, figures), grads = jax.value_and_grad(of, has_aux=True)(state.trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to counts
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            rate = jnp.asarray(schedule(state.step), jnp.float32)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree_utils.tree_norm(grads), "learning_rate": rate}
        return TrainState(state.step + 1, trainable, opt_state), figures | metrics

    return jax.jit(train_step, donate_argnums=0)


def make_ranks(trainer: HeadTrainer) -> Callable[[Any, Any, HeadBatch], tuple[jax.Array, jax.Array]]:
    """Returns the jitted function (target's params, values, batch) -> (i32[B, T, K], bool[B, T, K]).

    The first says how many tokens, of all, the head finds likelier than the right one; the second where that counts.
    """

    @jax.jit
    def ranks(params: Any, values: Any, batch: HeadBatch) -> tuple[jax.Array, jax.Array]:
        batch, y = _guessed(trainer, params, values, batch)
        labels, wanted = offsets_ahead(batch, trainer.config.offsets)
        rows, length = labels.shape[:2]
        width = min(length, max(1, LOSS_CHUNK // (2 * rows)))

        def of(chunk):
            logits = scores(trainer.model, params, chunk[0])
            right = jnp.take_along_axis(logits, chunk[1][..., None], axis=-1)
            return jnp.sum(logits > right, axis=-1, dtype=jnp.int32)

        found = jnp.moveaxis(jax.lax.map(of, columns((y, labels), width)), 0, 1)
        return found.reshape(rows, -1, found.shape[-1])[:, :length], wanted

    return ranks
