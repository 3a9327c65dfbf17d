"""LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation (2406.12832): W' + s a core b.

The first factor is frozen from the start, the square core is trained throughout, and the rows of `b` are trained at
first and frozen one after another, so that a layer ends with R^2 trained numbers. As `a` has no gradient, what entered
the layer need not be kept for one: only x a is, R wide.

Two starts, both of them the model's own function:

`svd`, of the paper: W = u diag(sigma) v, of which the R largest singular values are trained: a = u, core = diag(sigma)
/ s, b = v, over the rest W' = W - a a^T W. (The residual follows from `a` alone, so nothing else need be kept for it.
It has the kernel's dtype: over a bfloat16 model the start is the model's own up to that rounding.) Weight decay is kept
off core and b, which hold weights of the model here.
`kaiming`, of the released code, which has no SVD: a as in LoRA, core uniform within 1 / sqrt(R), b = 0, W' = W.

Row i of b is frozen after t updates once R t / (share T) reaches i + 1, T being the updates of the run: the largest
singular values first. Frozen rows get no gradient and no update, so that neither momentum nor weight decay moves them.

Deviations: the released code divides t by share T without the factor R, so that it freezes at most the first rows,
counts micro-batches as updates, and stops gradients alone; its dropout is left out. The optimiser keeps moments for
frozen rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from finetune.adapters.adapter import LINEAR, Adapter, Factors, Kernels, check_rank, module_key
from finetune.adapters.lora import uniform_a
from finetune.adapters.svd import truncated_svd
from models.errors import InputError
from models.kernels import PRECISION

NEVER = 2**31 - 1  # updates


@dataclasses.dataclass(frozen=True)
class LamdaConfig:
    """LaMDA.

    Attributes:
        rank: R.
        alpha: the correction's scale s is alpha / rank; None: alpha = rank.
        start: from the kernel's singular vectors, or from random ones.
        freeze_share: share of the run's updates after which all of b is frozen; 0: from the start on, .inf: never.
        targets: layers to adapt (`finetune.adapters.adapter.select`).
    """

    type: Literal["lamda"] = "lamda"
    rank: int = 32
    alpha: float | None = None
    start: Literal["svd", "kaiming"] = "svd"
    freeze_share: float = 0.3
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"alpha must be above 0 (or null for alpha = rank), got {self.alpha}")
        if not self.freeze_share >= 0:
            raise InputError(f"freeze_share must be 0 or more, got {self.freeze_share}")

    @property
    def scale(self) -> float:
        """Factor on the correction."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def lamda(config: LamdaConfig) -> Adapter:
    """Returns LaMDA as an adapter; R^2 + R O trained numbers per layer at first, R^2 at the end."""
    return lamda_with_ranks(config, lambda kernels: dict.fromkeys(kernels, config.rank))


def lamda_with_ranks(config: LamdaConfig, ranks: Callable[[Kernels], Mapping[str, int]]) -> Adapter:
    """Returns LaMDA with a rank per layer.

    Args:
        config: of the method; its own rank serves for the scale alone.
        ranks: kernels -> {path: R}.
    """
    start = _from_svd if config.start == "svd" else _from_kaiming

    def init(key, kernels, gradients):
        check_rank(config.rank, kernels)
        chosen = ranks(kernels)
        values = {path: start(key, path, kernel, chosen[path], config.scale) for path, kernel in kernels.items()}
        return {path: {"a": a} for path, (a, _) in values.items()}, {path: rest for path, (_, rest) in values.items()}

    def factors(frozen, trainable, shape):
        return Factors(frozen["a"], trainable["core"], trainable["b"], config.scale)

    def hook(inner, steps):
        return progressive_freeze(inner, config.freeze_share * steps)

    def moved(trainable, steps):
        return sum(_moved(values, steps, config.freeze_share * steps) for values in trainable.values())

    adapter = Adapter(init, factors, hook=hook, moved=moved, no_decay=frozenset({"core"}))
    if config.start == "svd":
        return adapter._replace(rebase=residual, no_decay=frozenset({"core", "b"}))
    return adapter


def residual(kernel: jax.Array, frozen: Mapping[str, jax.Array]) -> jax.Array:
    """Returns what the singular vectors a, f32[I, R], leave of a kernel: W - a a^T W, computed in float32."""
    w, a = kernel.astype(jnp.float32), frozen["a"]
    inside = jnp.matmul(a, jnp.matmul(a.T, w, precision=PRECISION), precision=PRECISION)
    return (w - inside).astype(kernel.dtype)


def frozen_after(rank: int, updates: float) -> np.ndarray:
    """Returns after how many updates each row of b is frozen, i32[R], if the last one is after `updates`."""
    # A row is due at the first whole t with R t / updates >= i + 1; the small number absorbs the products' rounding.
    due = [(row + 1) * updates / rank - 1e-6 for row in range(rank)]
    return np.asarray([NEVER if at >= NEVER else max(math.ceil(at), 0) for at in due], np.int32)


def _moved(values: Mapping[str, jax.Array], steps: int, updates: float) -> int:
    """Returns how many numbers of one layer `steps` updates move together, the last row of b being frozen then."""
    rank, width = values["b"].shape
    rows = np.minimum(frozen_after(rank, updates), steps)
    return values["core"].size * steps + width * int(rows.sum(dtype=np.int64))


class FreezeState(NamedTuple):
    """Updates made, i32[], and the wrapped optimiser's state."""

    count: jax.Array
    inner: Any


def progressive_freeze(inner: optax.GradientTransformation, updates: float) -> optax.GradientTransformation:
    """Returns an optimiser that does what `inner` does, but leaves frozen rows of the values named `b` as they are.

    Args:
        inner: the optimiser of all values.
        updates: after how many updates the last row is frozen; rows go at equal distances, the first one first.
    """

    def live(count, tree):
        def masked(path, value):
            if path[-1].key != "b":
                return value
            rows = count < frozen_after(value.shape[0], updates)
            return jnp.where(rows[:, None], value, 0.0)

        return jax.tree_util.tree_map_with_path(masked, tree)

    def init(params):
        return FreezeState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads, state, params):
        moves, inner_state = inner.update(live(state.count, grads), state.inner, params)
        return live(state.count, moves), FreezeState(state.count + 1, inner_state)

    return optax.GradientTransformation(init, update)


def _from_svd(key: jax.Array, path: str, kernel: jax.Array, rank: int, scale: float) -> tuple[jax.Array, dict]:
    u, sigma, v = truncated_svd(kernel, rank)
    return u, {"core": jnp.diag(sigma) / scale, "b": v}


def _from_kaiming(key: jax.Array, path: str, kernel: jax.Array, rank: int, scale: float) -> tuple[jax.Array, dict]:
    core_key = jax.random.fold_in(module_key(key, path), 1)
    core = jax.random.uniform(core_key, (rank, rank), jnp.float32, -1.0, 1.0) * rank**-0.5
    return uniform_a(key, path, kernel.shape[0], rank), {
        "core": core,
        "b": jnp.zeros((rank, kernel.shape[1]), jnp.float32),
    }
