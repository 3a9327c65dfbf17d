"""What is minimised, as plug-ins: most give one value per token, some one for a whole batch.

An `Objective` sees the logits of a chunk of tokens at a time, so that logits of a whole batch need never be kept. What
it needs beside logits and labels is in `constants` (read once per run: a teacher, a table of costs) and `context` (once
per micro-batch: what a teacher says of each token).

Axis letters: N tokens to be predicted, B rows, T tokens of a row, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from finetune.state import Batch


def _nothing(constants: Any, batch: Batch) -> Any:
    return None


def _same(params: Any, batch: Batch) -> Batch:
    return batch


class Objective(NamedTuple):
    """A loss.

    Attributes:
        per_token: (logits f32[N, V], labels i32[N], constants, context of these tokens) -> (value f32[N], {name:
            f32[N]}): what is averaged and minimised, and further figures to be averaged and logged.
        constants: arrays that every update reads; None: nothing.
        context: (constants, micro-batch of [B, T]) -> a tree of [B, T, ...]; entry t belongs to the prediction of token
            t + 1. Gradients do not flow into it.
        training_rows: (parameters of the model, micro-batch) -> the micro-batch that training sees in its place, such
            as one with texts that the model writes. Gradients do not flow into it; held-out data is taken as it is.
        total: (model, parameters, constants, micro-batch) -> what `finetune.trainer.summed_loss` returns, for losses
            that read more rows than the text has; None: the sum of `per_token`.
    """

    per_token: Callable[[jax.Array, jax.Array, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
    constants: Any = None
    context: Callable[[Any, Batch], Any] = _nothing
    training_rows: Callable[[Any, Batch], Batch] = _same
    total: Callable[[Any, Any, Any, Batch], tuple[jax.Array, dict[str, jax.Array]]] | None = None


class BatchObjective(NamedTuple):
    """A loss over a batch as a whole.

    Attributes:
        prepare: (batch of numpy arrays, updates made) -> the tree of arrays [1, B, ...] that `loss` reads, pure; each
            process prepares its own rows.
        start: parameters -> the objective's own state before the first update: arrays that nothing else holds.
        loss: (parameters, own state, batch of arrays [B, ...]) -> (mean f32[], {name: f32[], `tokens` among them: how
            many were predicted}, what `follow` needs).
        follow: (own state, parameters behind the update, what `loss` has left) -> own state.
        constants: None: what it reads, it carries.
    """

    prepare: Callable[[Any, int], Any]
    start: Callable[[Any], Any]
    loss: Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array], Any]]
    follow: Callable[[Any, Any, Any], Any]
    constants: None = None


def cross_entropy(z_loss: float = 0.0) -> Objective:
    """Returns the objective -log p(label), plus z_loss * log(Z)^2 with Z the softmax's normaliser (PaLM, section 5).

    Args:
        z_loss: weight of the second term, which keeps logits from drifting; 0 leaves it out.
    """

    def per_token(logits, labels, constants, context):
        log_z = jax.nn.logsumexp(logits, axis=-1)
        value = log_z - label_scores(logits, labels)
        if not z_loss:
            return value, {}
        return value + z_loss * jnp.square(log_z), {"cross_entropy": value}

    return Objective(per_token)


def label_scores(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logits of the labels, f32[N]."""
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
