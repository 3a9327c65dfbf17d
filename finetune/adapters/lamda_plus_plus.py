"""LaMDA++ (2406.12832): LaMDA with ranks that follow from the spectra of the model's own kernels.

A kernel whose R largest singular values hold little of its energy gets more than the middle rank R, one where they hold
most of it gets less. The ranks are R / 2, R and 2 R, and their sum is what R in every layer would give.

Deviation: the released code has no allocation and the paper's abstract leaves the rule open. Here layers are sorted by
the energy that R holds; the sixth with the least gets 2 R, the third with the most R / 2, which keeps the sum. A layer
whose smaller side is below 2 R is not among those that get it. Of less than six layers, all get R.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from finetune.adapters.adapter import Adapter, Kernels
from finetune.adapters.lamda import LamdaConfig, lamda_with_ranks
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class LamdaPlusPlusConfig(LamdaConfig):
    """LaMDA++: the fields of LaMDA, of which `rank` is the middle rank, an even number."""

    type: Literal["lamda_plus_plus"] = "lamda_plus_plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % 2:
            raise InputError(f"rank must be even, as some layers get half of it; got {self.rank}")


def lamda_plus_plus(config: LamdaPlusPlusConfig) -> Adapter:
    """Returns LaMDA++ as an adapter; R_l^2 + R_l O trained numbers in layer l at first, R_l^2 at the end."""
    return lamda_with_ranks(config, lambda kernels: allocate(kernels, config.rank))


def energy(kernel: jax.Array) -> jax.Array:
    """Returns the share of a kernel's squared singular values that the r largest hold, f32[min(I, O)], for r = 1.."""
    squares = jnp.square(jnp.linalg.svd(kernel.astype(jnp.float32), compute_uv=False))
    return jnp.cumsum(squares) / jnp.sum(squares)


def allocate(kernels: Kernels, rank: int) -> dict[str, int]:
    """Returns {path: rank of the layer}, each rank / 2, rank or 2 rank, with a mean of rank."""
    held = {path: float(energy(kernel)[rank - 1]) for path, kernel in kernels.items()}
    order = sorted(kernels, key=lambda path: (held[path], path))
    high = [path for path in order if min(kernels[path].shape) >= 2 * rank][: len(order) // 6]
    low = [path for path in reversed(order) if path not in high][: 2 * len(high)]
    return dict.fromkeys(kernels, rank) | dict.fromkeys(high, 2 * rank) | dict.fromkeys(low, rank // 2)
