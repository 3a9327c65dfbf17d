"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters (2405.17604): W + (alpha / rank) a core b.

With W = U S V the singular value decomposition, `a` is U S and `b` is V, both cut to the rank and frozen, as in the
released code (its kernels lie the same way here: the singular values stand on the input's side). `core` alone is
trained; it starts normal with deviation 1e-5, so that training starts from the model but for noise (section 3).

Deviations: no dropout on the correction's input.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from finetune.adapters.adapter import LINEAR, Adapter, Factors, check_rank, module_key
from finetune.adapters.svd import truncated_svd
from models.errors import InputError

_DEVIATION = 1e-5


@dataclasses.dataclass(frozen=True)
class LoraXsConfig:
    """LoRA-XS.

    Attributes:
        rank: R.
        alpha: the correction's scale is alpha / rank; None: alpha = rank.
        targets: layers to adapt (`finetune.adapters.adapter.select`).
    """

    type: Literal["lora_xs"] = "lora_xs"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")

    @property
    def scale(self) -> float:
        """Factor on the correction."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def lora_xs(config: LoraXsConfig) -> Adapter:
    """Returns LoRA-XS as an adapter; R * R trained numbers per layer."""

    def init(key, kernels, gradients):
        check_rank(config.rank, kernels)
        frozen, trainable = {}, {}
        for path, kernel in kernels.items():
            u, s, v = truncated_svd(kernel, config.rank)
            frozen[path] = {"a": u * s[None, :], "b": v}
            noise = jax.random.normal(module_key(key, path), (config.rank, config.rank), jnp.float32)
            trainable[path] = {"core": _DEVIATION * noise}
        return frozen, trainable

    def factors(frozen, trainable, shape):
        return Factors(frozen["a"], trainable["core"], frozen["b"], config.scale)

    return Adapter(init, factors)
