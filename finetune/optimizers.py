"""Optimisers and schedules from a config, all of them optax's.

The chain, in order: clipping of the global norm, the optimiser's direction, decoupled weight decay (on matrices only,
and never on the values that a method exempts), the learning rate; around all of it the method's hook.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from finetune.state import Method
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How values follow their gradients.

    Attributes:
        type: AdamW, or plain gradient descent (`sgd`).
        learning_rate: the highest.
        schedule: what it does after the warm-up: stays, or falls to 0 along a line or a half cosine.
        warmup: updates of linear rise from 0; below 1 a share of all updates.
        weight_decay: per update, times the learning rate.
        beta1: of AdamW.
        beta2: of AdamW.
        epsilon: of AdamW.
        clip: largest global norm of a gradient; None: no clipping.
    """

    type: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate >= 0 or not self.warmup >= 0 or not self.weight_decay >= 0:
            raise InputError(
                "learning_rate, warmup and weight_decay must not be negative, got "
                f"{self.learning_rate}, {self.warmup}, {self.weight_decay}"
            )
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip must be above 0 (or null for no clipping), got {self.clip}")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by update, counted from 0, for a run of `steps` updates."""
    warm = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    rest, peak = max(steps - warm, 1), config.learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]
    if not warm:
        return after
    # The first update of a warm-up moves already: 1/warm of the peak, as an update at rate 0 would be lost.
    return optax.join_schedules([optax.linear_schedule(peak / warm, peak, max(warm - 1, 1)), after], [warm])


def make_optimizer(config: OptimizerConfig, steps: int, method: Method) -> optax.GradientTransformation:
    """Returns the optimiser of a run of `steps` updates."""
    direction = (
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon) if config.type == "adamw" else optax.identity()
    )

    def decays(trainable: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, value: jnp.ndim(value) > 1 and path[-1].key not in method.no_decay, trainable
        )

    chain = [
        *([] if config.clip is None else [optax.clip_by_global_norm(config.clip)]),
        direction,
        *([optax.add_decayed_weights(config.weight_decay, decays)] if config.weight_decay else []),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    ]
    return method.hook(optax.chain(*chain), steps)
