"""LoRA: Low-Rank Adaptation of Large Language Models (2106.09685): W + (alpha / rank) a b, both factors trained.

`a` starts uniform as in the released code (Kaiming with slope sqrt(5): bounds 1 / sqrt(I)), `b` at zero, so that
training starts from the model itself. Deviation: no dropout on the correction's input.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from finetune.adapters.adapter import LINEAR, Adapter, Factors, check_rank, module_key
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA.

    Attributes:
        rank: R.
        alpha: the correction's scale is alpha / rank; None: alpha = rank.
        targets: layers to adapt (`finetune.adapters.adapter.select`).
    """

    type: Literal["lora"] = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")

    @property
    def scale(self) -> float:
        """Factor on the correction."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def uniform_a(key: jax.Array, path: str, width: int, rank: int) -> jax.Array:
    """Returns LoRA's first factor for a layer, f32[I, R], uniform within 1 / sqrt(I)."""
    return jax.random.uniform(module_key(key, path), (width, rank), jnp.float32, -1.0, 1.0) * width**-0.5


def lora(config: LoraConfig) -> Adapter:
    """Returns LoRA as an adapter; R (I + O) trained numbers per layer."""

    def init(key, kernels, gradients):
        check_rank(config.rank, kernels)
        trainable = {
            path: {
                "a": uniform_a(key, path, kernel.shape[0], config.rank),
                "b": jnp.zeros((config.rank, kernel.shape[1]), jnp.float32),
            }
            for path, kernel in kernels.items()
        }
        return {path: {} for path in kernels}, trainable

    def factors(frozen, trainable, shape):
        return Factors(trainable["a"], None, trainable["b"], config.scale)

    return Adapter(init, factors)
