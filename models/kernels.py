"""Kernel values: what a linear layer multiplies with.

A layer calls `kernel.dot(x)` and never asks what the kernel is. Adapters, quantisation and neuron selection replace
entries of the parameter tree by other kernel values; no layer is ever forked. A bare array in the parameter tree is a
dense kernel.

Axis letters: I input features, O output features.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

# float32 products are float32 products on every device: GPUs and TPUs would otherwise round their operands first.
# bfloat16 products are not affected.
PRECISION = jax.lax.Precision.HIGHEST


@runtime_checkable
class Kernel(Protocol):
    """What a linear layer needs of its kernel. Implementations are pytrees, to stand in a parameter tree."""

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O) of the matrix that this kernel stands for."""

    def dot(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """Maps [..., I] to [..., O], in `dtype` (None: x's own)."""

    def materialize(self) -> jax.Array:
        """Returns the matrix itself, [I, O]: equals `dot` of the identity."""


@struct.dataclass
class Dense:
    """A plain matrix, w: [I, O].

    Inputs come first because a CPU multiplies few rows (a decode step, a draft tree) faster in that order.
    """

    w: jax.Array

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O)."""
        return self.w.shape

    def dot(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """Returns x w, [..., O]."""
        if x.size == self.w.shape[0] and x.size % 2 == 0 and jax.default_backend() == "cpu":
            return _one_row(x, self.w, dtype)
        return jnp.matmul(x, self.w, precision=PRECISION, preferred_element_type=dtype)

    def materialize(self) -> jax.Array:
        """Returns w."""
        return self.w


def as_kernel(value: jax.Array | Kernel) -> Kernel:
    """Returns a kernel value as it is, and a bare array as `Dense`."""
    return value if isinstance(value, Kernel) else Dense(value)


def _one_row(x: jax.Array, w: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """Returns x [..., I] times w [I, O] for a single row x, as the sum of two half products.

    A decode step of batch one is bound by the reading of w. XLA's CPU backend hands a product with a batch
    axis to another implementation than a vector-matrix product, and that one reads faster.
    """
    halves = jnp.einsum(
        "hi,hio->ho", x.reshape(2, -1), w.reshape(2, -1, w.shape[1]), precision=PRECISION, preferred_element_type=dtype
    )
    return halves.sum(0).reshape(*x.shape[:-1], w.shape[1])
