"""LoRA-SB: Initialization using Update Approximation is a Silver Bullet (2411.19557): W + a core b.

The first update that AdamW would make to a whole kernel is D = -eta sign(G), with G the gradient summed over some of
the training data. Its best approximation of rank R is the start: D ~ U S V gives `a` = U and `b` = V, frozen, and
`core` = diag(S), trained (algorithm 1). As both factors are orthonormal and the scale is 1, a gradient step on the core
moves the kernel by that gradient's projection on the two subspaces, at every step (theorem 3): no scale is to be tuned.
Training starts from W + (u s) v, not from W.

Deviations. The released code takes for eta the learning rate of the first warm-up step of a run over the batches of the
gradient pass; here it is a setting, to be chosen as the first learning rate of the run (the peak over the updates of
the warm-up). The subspaces do not depend on it. The decomposition is exact where the code's is randomised, and the
factors stay in float32, where bfloat16 would lose orthonormality. The core is exempt from weight decay, which would
pull it from its start; the code leaves a decay of 0.01 on. No dropout on the correction's input.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from finetune.adapters.adapter import LINEAR, Adapter, Factors, check_rank
from finetune.adapters.svd import truncated_svd
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class LoraSbConfig:
    """LoRA-SB.

    Attributes:
        rank: R.
        first_step: eta, how far the first update moves each entry of a kernel; above 0.
        gradient_batches: batches of the training data that the gradient is summed over
            (`finetune.adapters.gradients.sum_gradients`); the paper takes 0.1 percent of the data.
        targets: layers to adapt (`finetune.adapters.adapter.select`).
    """

    type: Literal["lora_sb"] = "lora_sb"
    rank: int = 16
    first_step: float = 1e-5
    gradient_batches: int = 8
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        for name in ("rank", "gradient_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.first_step > 0:
            raise InputError(f"first_step must be above 0, got {self.first_step}; take the run's first learning rate")


def lora_sb(config: LoraSbConfig) -> Adapter:
    """Returns LoRA-SB as an adapter; R * R trained numbers per layer."""

    def init(key, kernels, gradients):
        if gradients is None:
            raise InputError(
                "LoRA-SB starts from the gradient of the loss; pass what "
                "finetune.adapters.gradients.sum_gradients returns"
            )
        check_rank(config.rank, kernels)
        frozen, trainable = {}, {}
        for path in kernels:
            u, s, v = truncated_svd(-jnp.sign(gradients[path]), config.rank)
            frozen[path], trainable[path] = {"a": u, "b": v}, {"core": jnp.diag(config.first_step * s)}
        return frozen, trainable

    def factors(frozen, trainable, shape):
        return Factors(frozen["a"], trainable["core"], frozen["b"], 1.0)

    return Adapter(init, factors, needs_gradients=True, no_decay=frozenset({"core"}))
