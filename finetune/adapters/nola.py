"""NOLA: Networks as Linear Combination of Low Rank Random Basis (2310.02556): both factors of a LoRA are mixtures of
random matrices that a key can make again, and only the mixtures' coefficients are trained and kept.

    a = a0 + sum_k mix_a[k] A_k        b = sum_k mix_b[k] B_k        W + (alpha / rank) a b

So a layer has as many trained numbers as there are matrices, whatever its shape and rank. The matrices exist a few at a
time, in the forward pass and again in the backward pass. Every layer has its own ones, which follow from the key of the
run and the layer's path. They are drawn in float32 by threefry2x32 in the form that JAX calls partitionable (its
default), which gives the same numbers on every device; a run that switches it off cannot read the adapters of one that
did not.

Deviations: coefficients are kept in float32 (the paper's quantised ones are not here). The released code writes a
merged weight that leaves the trained part out; `merge` adds it.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from finetune.adapters.adapter import LINEAR, Adapter, Factors, check_rank, module_key
from models.errors import InputError
from models.kernels import PRECISION

CHUNK = 4  # matrices of a factor that exist at a time
KEY_TYPE = "threefry2x32"
START, BASIS_A, BASIS_B = range(3)  # what is drawn for a layer


@dataclasses.dataclass(frozen=True)
class NolaConfig:
    """NOLA.

    Attributes:
        rank: R.
        alpha: the correction's scale is alpha / rank; None: alpha = rank in `lm` and alpha = 1 in `vit`.
        bases: random matrices that each factor mixes.
        variant: of the released code: `lm` starts from LoRA's own start, with all coefficients 0 and matrices uniform
            within 1 / sqrt(bases); `vit` starts near the model, with no a0, all coefficients 1 / bases and matrices
            uniform within 1 / sqrt(their number of entries).
        targets: layers to adapt (`finetune.adapters.adapter.select`).
    """

    type: Literal["nola"] = "nola"
    rank: int = 8
    alpha: float | None = None
    bases: int = 64
    variant: Literal["lm", "vit"] = "lm"
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1 or self.bases < 1:
            raise InputError(f"rank and bases must be at least 1, got {self.rank} and {self.bases}")

    @property
    def scale(self) -> float:
        """Factor on the correction."""
        if self.alpha is None:
            return 1.0 if self.variant == "lm" else 1.0 / self.rank
        return self.alpha / self.rank


def nola(config: NolaConfig) -> Adapter:
    """Returns NOLA as an adapter; 2 bases trained numbers per layer."""

    def init(key, kernels, gradients):
        check_rank(config.rank, kernels)
        start = 0.0 if config.variant == "lm" else 1.0 / config.bases
        frozen = {path: {"key": jax.random.bits(module_key(key, path), (2,), jnp.uint32)} for path in kernels}
        trainable = {
            path: {name: jnp.full(config.bases, start, jnp.float32) for name in ("mix_a", "mix_b")} for path in kernels
        }
        return frozen, trainable

    def bound(shape):
        return (config.bases if config.variant == "lm" else shape[0] * shape[1]) ** -0.5

    def factors(frozen, trainable, shape):
        key = jax.random.wrap_key_data(frozen["key"], impl=KEY_TYPE)
        shape_a, shape_b = (shape[0], config.rank), (config.rank, shape[1])
        a = mixture(jax.random.fold_in(key, BASIS_A), trainable["mix_a"] * bound(shape_a), shape_a)
        b = mixture(jax.random.fold_in(key, BASIS_B), trainable["mix_b"] * bound(shape_b), shape_b)
        if config.variant == "lm":
            a = a + basis(jax.random.fold_in(key, START), 0, shape_a) * shape[0] ** -0.5
        return Factors(a, None, b, config.scale)

    return Adapter(init, factors, no_decay=frozenset({"mix_a", "mix_b"}), together=True)


def basis(key: jax.Array, index: jax.Array | int, shape: tuple[int, int]) -> jax.Array:
    """Returns one random matrix of a key, f32[shape], uniform within 1."""
    return jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -1.0, 1.0)


@functools.partial(jax.jit, static_argnames=("shape", "chunk"))
def mixture(key: jax.Array, coefficients: jax.Array, shape: tuple[int, int], chunk: int = CHUNK) -> jax.Array:
    """Returns sum_k coefficients[k] basis(key, k), f32[shape], without keeping the matrices.

    Args:
        key: of the basis.
        coefficients: f32[K].
        shape: of the matrices.
        chunk: matrices that exist at a time, in the forward and in the backward pass.
    """
    chunk = min(chunk, len(coefficients))
    short = -len(coefficients) % chunk
    indices = jnp.arange(len(coefficients) + short, dtype=jnp.uint32).reshape(-1, chunk)
    parts = jnp.pad(coefficients, (0, short)).reshape(-1, chunk)

    # The sum stays outside of what is checkpointed, so that only coefficients are kept for the backward pass. Inside a
    # scan, XLA cannot merge the two drawings of a matrix into one.
    def mixed(indices, part):
        matrices = jax.vmap(lambda index: basis(key, index, shape))(indices)
        return jnp.einsum("k,kio->io", part, matrices, precision=PRECISION)

    mixed = jax.checkpoint(mixed, prevent_cse=False)
    return jax.lax.scan(lambda total, chunk: (total + mixed(*chunk), None), jnp.zeros(shape), (indices, parts))[0]
