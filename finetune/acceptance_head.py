"""Training the head that SpecDec++ (2405.19715) stops drafts by: labels, loss, optimiser, and what it comes to.

Labels. The target samples a text X behind each prompt at temperature 1. The draft reads it and gives a law q at every
place; one token Y is drawn from each. The label of Y is its chance of being accepted, min(1, p(Y) / q(Y)), with p the
target's law at that place: both laws are given X before it. The head reads hidden states of a text that is mostly the
draft's own: at each place X with probability `mix`, Y otherwise, and only places with Y count. So a hidden state has
drafted tokens behind it that its label's law has not; the paper wants this noise, which real drafts have too.

Loss. Cross-entropy with soft labels, where a rejection weighs `weight` times an acceptance. It is least not at the
label p but at p / (p + weight (1 - p)): heads underestimate on purpose. Figures (binary KL divergence, calibration
error) are of the head's word with the weight undone (`unweighted`), so that they mean the same whatever the weight.

Deviations. The paper trains 3 epochs on 40,000 texts at a learning rate of 5e-5; for some thousand places the rate here
is 1e-3, and training ends when the divergence on held-out prompts no longer falls. Batches are of places drawn from all
texts, not of texts: hidden states are read once and kept (float16). The paper's divergence is of the head's own word,
which is least where a weighted head is not meant to be: training would end early by it.

Axis letters: B batch, T prompt with text, N places, D the draft's width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from decoding import WithDraft, make_decode_fn
from decoding.prefill import Prompts, pad_prompts
from decoding.sampling import draw
from decoding.state import write_tokens
from models.acceptance_head import AcceptanceHead, read_hidden
from models.decoder import Decoder
from models.errors import InputError

_BINS = 10


class Features(NamedTuple):
    """What a head learns from: hidden f16[N, D] of the draft behind each token, accept f32[N] the tokens' labels."""

    hidden: np.ndarray
    accept: np.ndarray


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a head is trained.

    Attributes:
        depth: blocks of the head.
        weight: of a rejection in the loss.
        epochs: at most.
        patience: epochs without a better held-out divergence after which training ends.
        batch_size: places per update.
        learning_rate: the highest, after a linear warm-up; a cosine leads it to 0.
        warmup: share of all updates.
        seed: of the weights and of the order of places.
    """

    depth: int = 3
    weight: float = 6.0
    epochs: int = 20
    patience: int = 3
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("depth", "epochs", "patience", "batch_size"):
            if getattr(self, name) < (0 if name == "depth" else 1):
                raise InputError(f"{name} is too small: {getattr(self, name)}")
        if not (self.weight > 0 and self.learning_rate > 0 and 0 <= self.warmup < 1):
            raise InputError(
                f"weight and learning_rate must be above 0 and warmup in [0, 1); got {self.weight}, "
                f"{self.learning_rate}, {self.warmup}"
            )


class Scores(NamedTuple):
    """A head on a set of features, weight undone: binary KL divergence in nats, expected calibration error."""

    kl: float
    ece: float


@functools.partial(jax.jit, static_argnums=(0, 1))
def label(
    target: Decoder,
    draft: Decoder,
    params: WithDraft,
    prompts: Prompts,
    text: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    mix: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels a batch of sampled texts.

    Args:
        target: the model that wrote the texts.
        draft: the model that drafts.
        params: of both.
        prompts: what the texts follow.
        text: i32[B, N], X.
        lengths: i32[B], tokens of each text.
        keys: one per row.
        mix: f32[], the chance that the draft reads X and not Y at a place.

    Returns:
        (hidden f32[B, N, D] of the draft behind each token that it reads, accept f32[B, N], counted bool[B, N]: places
        with a token of the draft).
    """
    places = jnp.arange(text.shape[1])[None, :]
    whole = jnp.pad(prompts.tokens, ((0, 0), (0, text.shape[1])))
    true = write_tokens(whole, prompts.lengths, text, lengths)
    behind = prompts.lengths[:, None] + places
    q = jax.nn.log_softmax(draft.apply({"params": params.draft}, true, None, behind - 1, method=read_hidden)[0])
    p = jax.nn.log_softmax(target.apply({"params": params.target}, true, None, behind - 1, method=read_hidden)[0])
    draws = jax.vmap(lambda key: jax.random.split(key, text.shape[1] + 1))(keys)
    y = draw(q.reshape(-1, q.shape[-1]), draws[:, 1:].reshape(-1)).reshape(text.shape)
    accept = acceptance(*(jnp.take_along_axis(law, y[..., None], axis=-1)[..., 0] for law in (p, q)))
    mixed_in = jax.vmap(lambda key: jax.random.uniform(key, text.shape[1:]))(draws[:, 0]) < mix
    read = write_tokens(whole, prompts.lengths, jnp.where(mixed_in, text, y), lengths)
    hidden = draft.apply({"params": params.draft}, read, None, behind, method=read_hidden)[1]
    return hidden, accept, (places < lengths[:, None]) & ~mixed_in


def acceptance(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Returns min(1, p / q)."""
    return jnp.exp(jnp.minimum(log_p - log_q, 0.0))


def collect(
    target: Decoder,
    target_params: Any,
    draft: Decoder,
    draft_params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    stop_tokens: Sequence[int] = (),
    mix: float = 0.15,
    seed: int = 0,
    batch_size: int = 4,
    report: Callable[[int], None] = lambda done: None,
) -> Features:
    """Returns features of texts that the target samples behind prompts.

    Args:
        target: the model that verifies.
        target_params: its parameters.
        draft: the model that drafts, of the same vocabulary.
        draft_params: its parameters.
        prompts: lists of token ids; prompt i samples with `seed` + i, and batches hold prompts of similar lengths.
        max_new_tokens: of each text.
        stop_tokens: ids that end a text.
        mix: the chance that the draft reads the target's token at a place.
        seed: of texts and labels.
        batch_size: prompts read together.
        report: called with the number of prompts done after each batch.

    Raises:
        InputError: a prompt that no model can read, or a setting out of range.
    """
    if not 0 <= mix < 1:
        raise InputError(f"mix is the chance of a token without a label, 0 to below 1; got {mix}")
    decode_fn = make_decode_fn(target, "sample", max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)
    params = WithDraft(target_params, draft_params)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    hidden, accept = [], []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[row] for row in rows]
        texts = decode_fn(target_params, batch, [seed + row for row in rows])
        padded = pad_prompts(batch, target.config.vocab_size)
        keys = jnp.stack([jax.random.fold_in(jax.random.key(seed + row), 1) for row in rows])
        labelled = label(target, draft, params, padded, texts.tokens, texts.lengths, keys, jnp.float32(mix))
        features, labels, counted = map(np.asarray, labelled)
        hidden.append(features[counted].astype(np.float16))
        accept.append(labels[counted])
        report(start + len(rows))
    return Features(np.concatenate(hidden), np.concatenate(accept))


def loss(logits: jax.Array, accept: jax.Array, weight: float) -> jax.Array:
    """Returns the weighted cross-entropy, f32[], of logits f32[N, 2] and labels f32[N], over the sum of weights."""
    log_reject, log_accept = jnp.moveaxis(jax.nn.log_softmax(logits, axis=-1), -1, 0)
    heavy = weight * (1.0 - accept)
    return -jnp.sum(heavy * log_reject + accept * log_accept) / jnp.sum(heavy + accept)


def unweighted(logits: jax.Array, weight: float) -> jax.Array:
    """Returns logits f32[N, 2] that say the label itself where `loss` is least: log-odds + log(weight)."""
    return logits + jnp.log(jnp.asarray([1.0, weight], jnp.float32))[None, :]


def binary_kl(logits: jax.Array, accept: jax.Array) -> jax.Array:
    """Returns the mean divergence of the head's word from the labels, f32[] in nats: 0 where they agree."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    labels = jnp.stack([1.0 - accept, accept], axis=-1)
    return jnp.mean(jnp.sum(jax.scipy.special.xlogy(labels, labels) - labels * logs, axis=-1))


def calibration_error(logits: jax.Array, accept: jax.Array) -> jax.Array:
    """Returns the expected calibration error, f32[]: |mean word - mean label| in ten equal bins, by places in each."""
    word = jax.nn.softmax(logits, axis=-1)[:, 1]
    place = jnp.minimum((word * _BINS).astype(jnp.int32), _BINS - 1)
    return jnp.sum(jnp.abs(jnp.zeros(_BINS).at[place].add(word - accept))) / len(word)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: TrainConfig, params: Any, hidden: jax.Array, accept: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = unweighted(AcceptanceHead(config.depth).apply({"params": params}, hidden), config.weight)
    return binary_kl(logits, accept), calibration_error(logits, accept)


def scores(config: TrainConfig, params: Any, features: Features) -> Scores:
    """Returns a head's figures on features."""
    return Scores(*map(float, _scores(config, params, *features)))


def optimiser(config: TrainConfig, updates: int) -> optax.GradientTransformation:
    """Returns AdamW without decay, over `updates` updates in all."""
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, round(config.warmup * updates), updates)
    return optax.adamw(rate, weight_decay=0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _epoch(config: TrainConfig, updates: int, params: Any, state: Any, hidden: Any, accept: Any, order: Any) -> Any:
    """Takes one update per row of order i32[U, batch]."""

    def update(carry, rows):
        params, state = carry

        def of(params):
            return loss(
                AcceptanceHead(config.depth).apply({"params": params}, hidden[rows]), accept[rows], config.weight
            )

        value, gradient = jax.value_and_grad(of)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to counts
            change, state = optimiser(config, updates).update(gradient, state, params)
        return (optax.apply_updates(params, change), state), value

    (params, state), values = jax.lax.scan(update, (params, state), order)
    return params, state, values.mean()


def train(
    features: Features, held_out: Features, config: TrainConfig, report: Callable[[int, float, Scores], None] = print
) -> tuple[Any, list[Scores]]:
    """Trains a head; the same features, config and machine give the same head.

    Args:
        features: to learn from.
        held_out: of other prompts, to stop by.
        config: how.
        report: called with epoch (0 before the first), mean loss and figures on `held_out`.

    Returns:
        (params, history): the parameters of the epoch with the lowest held-out divergence, and the figures of every
        epoch, those before training first.

    Raises:
        InputError: one of the two has no places.
    """
    if not len(features.accept) or not len(held_out.accept):
        raise InputError("no places to learn from, or none held out: sample longer texts or more of them")
    size = min(config.batch_size, len(features.accept))
    per_epoch = len(features.accept) // size
    updates = per_epoch * config.epochs
    params = AcceptanceHead(config.depth).init(jax.random.key(config.seed), features.hidden[:1])["params"]
    state = optimiser(config, updates).init(params)
    rng = np.random.default_rng(config.seed)
    hidden, accept = map(jnp.asarray, features)
    best, history = params, [scores(config, params, held_out)]
    report(0, float("nan"), history[0])
    for epoch in range(1, config.epochs + 1):
        order = rng.permutation(len(accept))[: per_epoch * size].reshape(per_epoch, size)
        params, state, value = _epoch(config, updates, params, state, hidden, accept, order)
        history.append(scores(config, params, held_out))
        report(epoch, float(value), history[-1])
        lowest = min(range(len(history)), key=lambda index: history[index].kl)
        best = params if lowest == epoch else best
        if epoch - lowest >= config.patience:
            break
    return best, history
