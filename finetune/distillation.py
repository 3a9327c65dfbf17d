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

_SAMPLE = 2  # the number of a text that the student wrote; those of the data, alone in their rows, have 1


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Distillation.

    Attributes:
        teacher: the model whose law is learnt, as `load_model` takes it; of the student's tokenizer.
        direction: which of the two laws the divergence is taken under.
        temperature: that both logits are divided by, above 0.
        label_share: weight of the cross-entropy with the labels, 0 to 1; the divergence has the rest.
        on_samples: whether the divergence is taken on answers that the student samples anew in each update, and the
            cross-entropy alone on the data's own (Return of the Encoder); for students with an encoder.
    """

    teacher: str
    type: Literal["distillation"] = "distillation"
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = 1.0
    label_share: float = 0.0
    on_samples: bool = False

    def __post_init__(self) -> None:
        if self.direction not in ("forward", "reverse"):
            raise InputError(f"direction must be forward or reverse, got {self.direction!r}")
        if not self.temperature > 0 or not 0 <= self.label_share <= 1:
            raise InputError(
                f"temperature must be above 0 and label_share 0 to 1, got {self.temperature} and {self.label_share}"
            )


def distillation(
    config: DistillationConfig,
    teacher: Network,
    teacher_params: Any,
    num_tokens: int,
    student: Network | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> Objective:
    """Returns distillation as an objective; it logs `cross_entropy` and `divergence`, the KL in nats.

    Args:
        config: which divergence.
        teacher: the network that is learnt from.
        teacher_params: its parameters.
        num_tokens: I; ids of the tokenizer that both models share.
        student: who is to write samples, with `on_samples`.
        stop_tokens: that end a sample.

    Raises:
        InputError: samples of a student without an encoder.
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

    if not config.on_samples:
        return Objective(per_token, teacher_params, context)
    if not isinstance(student, EncoderDecoder):
        raise InputError("on_samples needs a student with an encoder, which reads its prompts apart: set it to false")
    return sampling(Objective(per_token, teacher_params, context), config.label_share, student, stop_tokens)


def sampling(taught: Objective, label_share: float, student: EncoderDecoder, stop_tokens: tuple[int, ...]) -> Objective:
    """Returns distillation on samples: every row of a micro-batch once with its own answer, once with the student's.

    The loss is label_share CE(own answer) + (1 - label_share) KL(student's answer), each per token of its kind as far
    as both kinds have equally many. Deviation: the released code draws with dropout on and averages over padding.
    """

    def training_rows(params: Any, batch: Batch) -> Batch:
        both = with_samples(student, params, batch, stop_tokens)
        return jax.tree.map(lambda *halves: jnp.concatenate(halves), batch, both)

    def context(constants: Any, batch: Batch) -> Any:
        return taught.context(constants, batch), batch.segments == _SAMPLE

    def per_token(logits, labels, constants, context):
        stream, is_sample = context
        _, figures = taught.per_token(logits, labels, constants, stream)
        kinds = (1.0 - label_share) * figures["divergence"], label_share * figures["cross_entropy"]
        return 2.0 * jnp.where(is_sample, *kinds), figures

    return Objective(per_token, taught.constants, context, training_rows)


def with_samples(student: EncoderDecoder, params: Any, batch: Batch, stop_tokens: tuple[int, ...]) -> Batch:
    """Returns a micro-batch with answers that the student samples at temperature 0.9 from its 128 likeliest tokens.

    What is drawn depends on the batch and the parameters alone, so that a run that goes on draws the same.
    """
    from decoding.method import Call
    from decoding.plan import Plan, decode
    from decoding.prefill import Prompts
    from decoding.registry import METHODS
    from decoding.sampling import Sampling, row_keys

    rows, room = batch.tokens.shape[0], batch.tokens.shape[1] - 1
    is_row = batch.segments[:, 0] > 0
    plan = Plan(EncoderDecoder(student.config), "sample", METHODS["sample"].options(), room, stop_tokens, None)
    ones, of_batch = jnp.ones((rows,)), jnp.sum(batch.tokens) * 31 + jnp.sum(batch.source.tokens)
    keys = row_keys(jax.random.key(of_batch), rows)
    settings = Sampling(0.9 * ones, jnp.full((rows,), 128, jnp.int32), ones, 0.0 * ones, ones)
    out = decode(plan, params, Prompts(*batch.source), Call(jnp.where(is_row, room, 0), keys, settings))
    tokens = jnp.concatenate([batch.tokens[:, :1], out.tokens], axis=1)
    real = (jnp.arange(room + 1)[None, :] <= out.lengths[:, None]) & is_row[:, None]
    places = jnp.broadcast_to(jnp.arange(room + 1)[None, :], tokens.shape)
    return Batch(
        tokens=jnp.where(real, tokens, 0),
        targets=real & (places > 0),
        segments=jnp.where(real, _SAMPLE, 0),
        positions=jnp.where(real, places, 0),
        source=batch.source,
    )


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
