"""SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models (2311.11696): W + (alpha / rank) a diag(gate) b.

Every direction of a LoRA gets a gate. After each update the gates alone are drawn towards 0 by a threshold xi, the
proximal step of an L1 penalty, so that directions which do not earn their keep become exactly 0; `finish` cuts these
out and leaves a plain LoRA whose rank differs from layer to layer. Rising thresholds, each for an equal share of the
run, are the paper's sparsifying schedule.

A gate without a gradient, standing at g, is gone after |g| / xi updates, and gates start as N(0, 1): to cut anything,
the sum of the thresholds over a run has to be of the order of 1. Against a gradient it is xi / learning rate that
counts, about 0.4 in the paper's own runs, as Adam moves a gate by about the learning rate.

Deviations: the optimiser and its schedule run on from one threshold to the next, where the paper starts them anew. The
released code also adds the L1 term to the loss, and trains normalisations and the head; none of that here. It has
another operator too, kept as `operator: code` for comparison.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from finetune.adapters.adapter import LINEAR, Adapter, Factors, Values, check_rank, module_key
from finetune.adapters.lora import uniform_a
from models.errors import InputError

Operator = Literal["soft", "code"]


@dataclasses.dataclass(frozen=True)
class SoraConfig:
    """SoRA.

    Attributes:
        rank: R at the start.
        alpha: the correction's scale is alpha / rank, also after directions are cut; None: alpha = rank.
        thresholds: xi, by which each update draws a gate towards 0; several: one after another, for equal shares of the
            run.
        operator: soft thresholding, or the released code's: what is below 2 xi (but for xi itself) becomes 0.
        targets: layers to adapt (`finetune.adapters.adapter.select`).
    """

    type: Literal["sora"] = "sora"
    rank: int = 8
    alpha: float | None = None
    thresholds: tuple[float, ...] = (1e-4,)
    operator: Operator = "soft"
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        if not self.thresholds or not all(threshold >= 0 for threshold in self.thresholds):
            raise InputError(f"thresholds must name one or more numbers, none negative, got {self.thresholds}")

    @property
    def scale(self) -> float:
        """Factor on the correction."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def sora(config: SoraConfig) -> Adapter:
    """Returns SoRA as an adapter; R (I + O + 1) trained numbers per layer, R' (I + O) once R - R' gates are cut."""

    def init(key, kernels, gradients):
        check_rank(config.rank, kernels)
        trainable = {
            path: {
                "a": uniform_a(key, path, kernel.shape[0], config.rank),
                "gate": jax.random.normal(jax.random.fold_in(module_key(key, path), 1), (config.rank,), jnp.float32),
                "b": jnp.zeros((config.rank, kernel.shape[1]), jnp.float32),
            }
            for path, kernel in kernels.items()
        }
        return {path: {} for path in kernels}, trainable

    def factors(frozen, trainable, shape):
        return Factors(trainable["a"], trainable.get("gate"), trainable["b"], config.scale)

    def hook(inner, steps):
        return proximal(inner, staged(config.thresholds, steps), config.operator)

    return Adapter(init, factors, hook=hook, finish=prune, no_decay=frozenset({"gate"}))


def staged(values: tuple[float, ...], steps: int) -> optax.Schedule:
    """Returns the schedule that takes these values in turn, each for an equal share of `steps` updates."""
    return lambda count: jnp.asarray(values, jnp.float32)[jnp.minimum(count * len(values) // steps, len(values) - 1)]


def threshold(x: jax.Array, xi: jax.Array, operator: Operator = "soft") -> jax.Array:
    """Draws every entry of x towards 0.

    Args:
        x: any shape.
        xi: f32[], not negative.
        operator: `soft`: the minimiser of (z - x)^2 / 2 + xi |z|; `code`: the released code's two assignments in turn.
    """
    shrunk = jnp.sign(x) * (jnp.abs(x) - xi)
    if operator == "soft":
        return jnp.where(jnp.abs(x) > xi, shrunk, 0.0)
    x = jnp.where(jnp.abs(x) > xi, shrunk, x)
    return jnp.where(jnp.abs(x) < xi, 0.0, x)


class ProximalState(NamedTuple):
    """Updates made, i32[], and the wrapped optimiser's state."""

    count: jax.Array
    inner: Any


def proximal(
    inner: optax.GradientTransformation, xi: optax.Schedule, operator: Operator = "soft"
) -> optax.GradientTransformation:
    """Returns an optimiser that does what `inner` does and then thresholds the values named `gate`.

    Args:
        inner: the optimiser of all values.
        xi: the threshold by update, counted from 0.
        operator: of `threshold`.
    """

    def init(params):
        return ProximalState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads, state, params):
        updates, inner_state = inner.update(grads, state.inner, params)
        now = xi(state.count)

        def gated(path, move, value):
            # value + (0 - value) is 0 without rounding, so that a gate that is cut is exactly 0.
            return threshold(value + move, now, operator) - value if path[-1].key == "gate" else move

        updates = jax.tree_util.tree_map_with_path(gated, updates, params)
        return updates, ProximalState(state.count + 1, inner_state)

    return optax.GradientTransformation(init, update)


def prune(frozen: Values, trainable: Values) -> tuple[Values, Values]:
    """Cuts out the directions whose gate is 0 and folds the other gates into b; a layer with none left is left out."""
    pruned = {}
    for path, values in trainable.items():
        kept = np.flatnonzero(np.asarray(values["gate"]))
        if kept.size:
            pruned[path] = {"a": values["a"][:, kept], "b": values["gate"][kept, None] * values["b"][kept]}
    return {path: frozen[path] for path in pruned}, pruned
