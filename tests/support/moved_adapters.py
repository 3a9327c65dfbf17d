"""Adapters of every method, away from their start as training leaves them: to test files and other libraries with."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from finetune.adapters import ADAPTERS, AdapterConfig, make_adapter
from finetune.adapters.adapter import Adapter, Values, select


def moved_adapter(
    name: str, params: Any, targets: Sequence[str], rank: int = 4, far: float = 0.1
) -> tuple[AdapterConfig, Adapter, Values, Values]:
    """Returns (config, adapter, frozen, trainable) of a method; normal numbers times `far` are on what is trained."""
    rng = np.random.default_rng(3)
    config = ADAPTERS[name][0](rank=rank, targets=tuple(targets))
    adapter = make_adapter(config)
    kernels = select(params, targets)
    gradients = {path: jnp.asarray(rng.standard_normal(kernel.shape), jnp.float32) for path, kernel in kernels.items()}
    frozen, trainable = adapter.init(jax.random.key(2), kernels, gradients if adapter.needs_gradients else None)
    trainable = jax.tree.map(lambda x: x + jnp.asarray(far * rng.standard_normal(x.shape), x.dtype), trainable)
    return config, adapter, *adapter.finish(frozen, trainable)
