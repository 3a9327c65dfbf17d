"""Training for Lexical Unit Decoding: units of text that the model is sure of, and placeholders that stand for them.

Source: "Decoding at the Speed of Thought" (LUD; 2405.15208); formulas and constants are a reconstruction, as in
`decoding.lexical_unit`. A unit opens at any token (its first is ordinary prediction) and goes on while the next token's
probability, given the true text before it, is above `confidence`, up to K tokens. Behind the token before a unit of n
tokens stand n - 1 placeholders; the j-th predicts the unit's token j + 1. It sees the text up to that token and the
placeholders before it, the text sees none:

    loss = mean cross-entropy of the text + weight * mean cross-entropy of the placeholders, each over its own targets

Deviation: confidences are those of the weights as they are trained, from the same pass, where a reference model would
be another pass; no gradient flows through them.

Axis letters: B rows, T tokens of a row, K tokens of a unit at most, D width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from decoding.lexical_unit import check_placeholder
from decoding.speculative.groups import Groups, group_attend
from finetune.objectives import Objective, cross_entropy
from finetune.rows import Rows
from finetune.state import Batch
from models.config import MoEConfig
from models.decoder import Decoder
from models.encoder_decoder import Network
from models.errors import InputError
from models.weights.tokenizer import Tokenizer

LOSS_ROWS = 512  # rows whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class LexicalUnitConfig:
    """Cross-entropy of text and of placeholders.

    Attributes:
        longest: K.
        placeholder: the token that stands for one to come; none of the texts may have it.
        confidence: the probability above which a token goes on with a unit.
        weight: of the placeholders' loss.
    """

    type: Literal["lexical_unit"] = "lexical_unit"
    longest: int = 4
    placeholder: int = 3
    confidence: float = 0.9
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise InputError(f"longest must be at least 2 tokens, got {self.longest}")
        if not 0 <= self.confidence < 1:
            raise InputError(f"confidence must be from 0 up and below 1, got {self.confidence}")
        if self.weight < 0 or self.placeholder < 0:
            raise InputError(f"weight and placeholder must not be negative, got {self.weight} and {self.placeholder}")


def check_unused(config: LexicalUnitConfig, texts: Sequence[Rows], tokenizer: Tokenizer) -> None:
    """Raises InputError where a text has the placeholder, which would then stand for two things.

    Args:
        config: names the placeholder.
        texts: all that a run reads.
        tokenizer: of the model; the message names one of its tokens that no text has, a special one where there is one.
    """
    used = set(np.unique(np.concatenate([rows.tokens for rows in texts])).tolist())
    if config.placeholder not in used:
        return
    special = [token for token, added in tokenizer.backend.get_added_tokens_decoder().items() if added.special]
    free = (
        t for t in [*sorted(special), *range(tokenizer.vocab_size)] if t not in used and t not in tokenizer.stop_ids
    )
    chosen = next(free, None)

    def named(token: int) -> str:
        return f"{token} ({tokenizer.backend.id_to_token(token)!r})"

    other = "no other is free either" if chosen is None else f"{named(chosen)} is free: set objective.placeholder to it"
    raise InputError(f"placeholder {named(config.placeholder)} is a token of the training texts; {other}")


def places_in_units(sure: jax.Array, longest: int) -> jax.Array:
    """Returns i32[B, T]: the place of each token in its unit, 0 where one opens.

    Args:
        sure: bool[B, T], the tokens that may go on with the unit of the token before them.
        longest: K.
    """

    def go_on(place: jax.Array, sure: jax.Array):
        place = jnp.where(sure & (place + 1 < longest), place + 1, 0)
        return place, place

    start = jnp.full((sure.shape[0],), longest, jnp.int32)  # nothing before the first token can be gone on with
    return jax.lax.scan(go_on, start, sure.T)[1].T


def _ahead(x: jax.Array, steps: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, steps)))[:, steps:]


def placeholder_targets(
    confidence: jax.Array, wanted: jax.Array, tokens: jax.Array, config: LexicalUnitConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns (i32[B, T, K-1] what the placeholders behind each token predict, bool[B, T, K-1] where that counts).

    Args:
        confidence: f32[B, T], of each token given those before it.
        wanted: bool[B, T], tokens that are to be predicted, from one before them of the same text.
        tokens: i32[B, T].
        config: what units are.
    """
    before = jnp.pad(wanted, ((0, 0), (1, 0)))[:, :-1]
    place = places_in_units(wanted & before & (confidence > config.confidence), config.longest)
    opens = _ahead(wanted & (place == 0), 1)
    steps = range(1, config.longest)
    labels = [_ahead(tokens, 1 + j) for j in steps]
    counts = [opens & (_ahead(place, 1 + j) == j) for j in steps]
    return jnp.stack(labels, axis=-1), jnp.stack(counts, axis=-1)


def unit_features(model: Decoder, tokens: jax.Array, batch: Batch, config: LexicalUnitConfig) -> jax.Array:
    """Runs the layers over a text and K - 1 placeholders behind each of its tokens: [B, T * K, D], the text first."""
    rows, length = tokens.shape
    count = config.longest - 1
    blanks = jnp.full((rows, length * count), config.placeholder, jnp.int32)
    ahead = batch.positions[..., None] + jnp.arange(1, config.longest)[None, None, :]
    positions = jnp.concatenate([batch.positions, ahead.reshape(rows, -1)], axis=1)
    x = model.embed(jnp.concatenate([tokens, blanks], axis=1), positions)
    groups = Groups(batch.positions, batch.segments, np.tri(count, dtype=bool))
    return model.layers(x, positions, attend=group_attend, ctx=groups)[0]


def _label_losses(model: Decoder, head: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy f32[N] of rows [N, D] with labels i32[N], some rows at a time."""
    count = len(x)
    pad = -count % min(LOSS_ROWS, count)
    x, labels = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(labels, (0, pad))

    @jax.checkpoint
    def of(chunk):
        logits = model.apply({"params": head}, chunk[0], method="unembed")
        right = jnp.take_along_axis(logits, chunk[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - right

    width = min(LOSS_ROWS, count)
    return jax.lax.map(of, (x.reshape(-1, width, x.shape[-1]), labels.reshape(-1, width))).reshape(-1)[:count]


def lexical_units(config: LexicalUnitConfig, model: Network) -> Objective:
    """Returns the objective; it logs `cross_entropy` of the text, `placeholder_loss` and `in_units`, the share of
    tokens that placeholders predict.

    Raises:
        InputError: a model that is no plain decoder, or one of mixtures, whose routers' losses are not those of
            placeholders; or no such token.
    """
    if not isinstance(model, Decoder) or any(isinstance(block.mlp, MoEConfig) for block in model.config.blocks):
        raise InputError(
            f"lexical_unit trains decoder-only models with MLPs, and this {model.config.family} model has an encoder, "
            "a compressor or experts: take another model or another objective"
        )
    check_placeholder(config.placeholder, model.config.vocab_size)

    def total(model: Decoder, params: Any, constants: Any, batch: Batch):
        rows, length = batch.tokens.shape
        x = model.apply({"params": params}, batch.tokens, batch, config, method=unit_features)
        head = {name: value for name, value in params.items() if not name.startswith("layers_")}
        same = jnp.pad(batch.segments[:, 1:] == batch.segments[:, :-1], ((0, 0), (1, 0)))
        wanted = batch.targets & same
        text = _label_losses(model, head, x[:, :length].reshape(-1, x.shape[-1]), _ahead(batch.tokens, 1).reshape(-1))
        text = text.reshape(rows, length)
        confidence = jnp.exp(-jnp.pad(text, ((0, 0), (1, 0)))[:, :-1])
        labels, counts = placeholder_targets(jax.lax.stop_gradient(confidence), wanted, batch.tokens, config)
        blank = _label_losses(model, head, x[:, length:].reshape(-1, x.shape[-1]), labels.reshape(-1))
        sum_text = jnp.where(_ahead(wanted, 1), text, 0.0).sum()
        sum_blank = jnp.where(counts.reshape(-1), blank, 0.0).sum()
        tokens, known = wanted.sum().astype(jnp.float32), counts.sum().astype(jnp.float32)
        mean_blank = sum_blank / jnp.maximum(known, 1.0) * tokens
        figures = {"cross_entropy": sum_text, "placeholder_loss": mean_blank, "in_units": known, "tokens": tokens}
        return sum_text + config.weight * mean_blank, figures

    return Objective(cross_entropy().per_token, total=total)
