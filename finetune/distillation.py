"""Distillation: the law of a teacher model as what is to be learnt (Hinton, Vinyals and Dean, 1503.02531).

    forward:  temperature^2 KL(teacher || student)    the student covers all that the teacher may say
    reverse:  temperature^2 KL(student || teacher)    the student keeps to what the teacher is likely to say

with both laws at `temperature`; the square keeps gradients of one size (1503.02531, section 2). A share of the
cross-entropy with the labels may be mixed in (with `reverse`: the loss of a mix of both directions on the data).

The teacher reads each micro-batch once. What is kept of it is its last residual stream, not its logits: these are made
chunk by chunk beside the student's. Both laws are over the tokenizer's ids, so that the two may pad their vocabularies
differently.

A decoder-only teacher may teach a student with an encoder (Return of the Encoder, 2501.16273): it reads source and
answer one behind the other, and its law before answer token k stands beside the student's (`joined`). The released code
pads the source on the left for that and averages over padding too; here rows stay ragged, and only tokens count.

Axis letters: B rows, T tokens of a row, S tokens of a source, N tokens to be predicted, D the teacher's width, V
vocabulary, I ids of the tokenizer.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from finetune.objectives import Objective, label_scores
from finetune.reading import read_batch
from finetune.state import Batch
from models.encoder_decoder import EncoderDecoder, Network, writing_stack
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Distillation.

    Attributes:
        teacher: the model whose law is learnt, as `load_model` takes it; of the student's tokenizer.
        direction: which of the two laws the divergence is taken under.
        temperature: that both logits are divided by, above 0.
        label_share: weight of the cross-entropy with the labels, 0 to 1; the divergence has the rest.
    """

    teacher: str
    type: Literal["distillation"] = "distillation"
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    label_share: float = 0.0

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise InputError(f"direction must be forward or reverse, got {self.direction!r}")
        if not self.temperature > 0 or not 0 <= self.label_share <= 1:
            raise InputError(
                f"temperature must be above 0 and label_share 0 to 1, got {self.temperature} and {self.label_share}"
            )


def distillation(config: DistillationConfig, teacher: Network, teacher_params: Any, num_tokens: int) -> Objective:
    """Returns distillation as an objective; it logs `cross_entropy` and `divergence`, the KL in nats.

    Args:
        config: which divergence.
        teacher: the network that is learnt from.
        teacher_params: its parameters.
        num_tokens: I; ids of the tokenizer that both models share.
    """

    def context(constants, batch):
        if batch.source is None or isinstance(teacher, EncoderDecoder):
            return read_batch(teacher, constants, batch)[0]
        whole, places = joined(batch)
        return jnp.take_along_axis(read_batch(teacher, constants, whole)[0], places[:, :, None], axis=1, mode="clip")

    def log_law(logits: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(logits[:, :num_tokens] / config.temperature, axis=-1)

    def per_token(logits, labels, constants, context):
        writing, params = writing_stack(teacher, constants)
        taught = writing.apply({"params": params}, context, method="unembed")
        pair = log_law(taught), log_law(logits)
        divergence = kl_divergence(*(pair if config.direction == "forward" else pair[::-1]))
        likelihood = jax.nn.logsumexp(logits, axis=-1) - label_scores(logits, labels)
        value = (1.0 - config.label_share) * config.temperature**2 * divergence + config.label_share * likelihood
        return value, {"cross_entropy": likelihood, "divergence": divergence}

    return Objective(per_token, teacher_params, context)


def joined(batch: Batch) -> tuple[Batch, jax.Array]:
    """Returns a micro-batch as a decoder-only model reads it, and where it predicts what the student's rows predict.

    Args:
        batch: [B, T] each, with sources [B, S]; a row is a start token and an answer.

    Returns:
        (a batch [B, S + T - 1] of each source with its answer right behind it, the start token gone; places i32[B, T]:
        the teacher's row at places[b, t] predicts token t + 1 of the student's row b. The last of them predicts nothing
        that is asked for).
    """
    (sources, lengths), answer = batch.source, jnp.sum(batch.segments > 0, axis=1) - 1
    slots = jnp.arange(sources.shape[1] + batch.tokens.shape[1] - 1)[None, :]
    behind = slots - lengths[:, None] + 1  # place in the student's row; that of the start token and less: in the source
    read = jnp.take_along_axis(sources, jnp.broadcast_to(slots, behind.shape), axis=1, mode="clip")
    written = jnp.take_along_axis(batch.tokens, behind, axis=1, mode="clip")
    real = behind <= answer[:, None]
    whole = Batch(
        tokens=jnp.where(real, jnp.where(behind < 1, read, written), 0),
        targets=real & (behind >= 1),
        segments=real.astype(jnp.int32),
        positions=jnp.where(real, slots, 0),
    )
    places = jnp.maximum(lengths[:, None] - 1, 0) + jnp.arange(batch.tokens.shape[1])[None, :]
    return whole, jnp.minimum(places, slots.shape[1] - 1)


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Returns KL(p || q) in nats, f32[N], of two laws as finite logarithms f32[N, I]."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
