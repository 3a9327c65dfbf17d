"""Kernel values: what a linear layer multiplies with.

A layer calls `kernel.dot(x)` and never asks what the kernel is. Adapters, quantisation and neuron selection replace
entries of the parameter tree by other kernel values; no layer is ever forked. A bare array in the parameter tree is a
dense kernel.

Axis letters: I input features, O output features, R rank.
"""

from typing import Any, Protocol, runtime_checkable

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


@struct.dataclass
class LowRank:
    """A kernel and a correction of low rank: base + scale * a core b.

    Attributes:
        base: [I, O], a bare array or any other kernel.
        a: [I, R].
        core: [R, R]; [R] for a diagonal; None for the identity.
        b: [R, O].
        scale: factor on the correction; static.
    """

    base: Any
    a: jax.Array
    core: jax.Array | None
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O)."""
        return self.a.shape[0], self.b.shape[1]

    def dot(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
        """Returns base.dot(x) + scale * ((x a) core) b, [..., O]; the product a core b is never made."""
        rows = x.reshape(-1, x.shape[-1])  # gradients of products of matrices are made without copies of x
        y = as_kernel(self.base).dot(rows, dtype)
        inner = _product(rows, self.a)
        if self.core is not None:
            inner = inner * _rows_of(self.core, inner) if self.core.ndim == 1 else _product(inner, self.core)
        y = y + (self.scale * _product(inner, self.b)).astype(y.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def materialize(self) -> jax.Array:
        """Returns the sum, [I, O], computed in float32, in the base's dtype."""
        base = as_kernel(self.base).materialize()
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        if self.core is not None:
            core = self.core.astype(jnp.float32)
            a = a * _rows_of(core, a) if core.ndim == 1 else _product(a, core)
        return (base.astype(jnp.float32) + self.scale * _product(a, b)).astype(base.dtype)


def select(kernel: jax.Array | Kernel, chosen: jax.Array, axis: int, spare: int = 0) -> Dense:
    """Returns some rows (axis 0) or columns (axis 1) of any kernel's matrix, gathered once.

    Args:
        kernel: [I, O]; one that is not dense is made so first.
        chosen: i32[n], which ones.
        axis: 0 keeps n of the inputs, 1 n of the outputs.
        spare: rows or columns of zeros behind them.
    """
    w = jnp.take(as_kernel(kernel).materialize(), chosen, axis=axis, mode="clip")
    return Dense(jnp.pad(w, [(0, spare if side == axis else 0) for side in range(2)]))


def as_kernel(value: jax.Array | Kernel) -> Kernel:
    """Returns a kernel value as it is, and a bare array as `Dense`."""
    return value if isinstance(value, Kernel) else Dense(value)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Returns x w in x's dtype."""
    return jnp.matmul(x, w.astype(x.dtype), precision=PRECISION)


def _rows_of(diagonal: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a vector in the rank and dtype of x, along its last axis."""
    return diagonal.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _one_row(x: jax.Array, w: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """Returns x [..., I] times w [I, O] for a single row x, as the sum of two half products.

    A decode step of batch one is bound by the reading of w. XLA's CPU backend hands a product with a batch
    axis to another implementation than a vector-matrix product, and that one reads faster.
    """
    halves = jnp.einsum(
        "hi,hio->ho", x.reshape(2, -1), w.reshape(2, -1, w.shape[1]), precision=PRECISION, preferred_element_type=dtype
    )
    return halves.sum(0).reshape(*x.shape[:-1], w.shape[1])
