"""The small parts that every network here is built from: linear layers, norms, embeddings, rotary positions, MLPs.

Axis letters: B batch, T query length, D model width, F feed-forward width, V vocabulary, H heads, Dh head width.
Norms and rotations compute in float32 and return the dtype they were given.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.config import MLPConfig, NormConfig, RelativeConfig, RopeConfig, RopeScaling
from models.kernels import as_kernel

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}
kernel_init = nn.initializers.normal(0.02)


class Linear(nn.Module):
    """y = kernel.dot(x) (+ bias): [..., I] -> [..., features].

    The kernel is read from the parameters as whatever kernel value stands there (`models.kernels`); a fresh one is a
    bare [I, features] array. Where chosen outputs stand there alone, a bias of the same stands beside them.
    """

    features: int
    use_bias: bool = False
    dtype: jnp.dtype | None = None  # of the output; None: x's own

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., I] to [..., features]."""
        kernel = self._entry("kernel", kernel_init, (x.shape[-1], self.features))
        y = as_kernel(kernel).dot(x, self.dtype)
        if self.use_bias:
            y = y + _along_last(self._entry("bias", nn.initializers.zeros, (self.features,)), y)
        return y

    def _entry(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Any:
        """Returns what stands in the parameters under a name, whatever its shape, or a fresh array."""
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, init, shape)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32.

    `scale` multiplies as it stands: checkpoints that store scale - 1 (Gemma) have the one added when they are loaded.
    """

    config: NormConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises x [..., D]."""
        wide = x.astype(jnp.float32)
        if self.config.kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.config.epsilon)
        wide = wide * _along_last(self.param("scale", nn.initializers.ones, x.shape[-1:]), wide)
        if self.config.kind == "layer":
            wide = wide + _along_last(self.param("bias", nn.initializers.zeros, x.shape[-1:]), wide)
        return wide.astype(x.dtype)


class Embedding(nn.Module):
    """A vector of width `width` for each of `num` ids: ids to vectors, and vectors back to scores over the ids.

    The table is stored [width, num], like a linear kernel and for the same reason (`models.kernels.Dense`); looking up
    a few columns costs little beside computing scores.
    """

    num: int
    width: int

    def setup(self) -> None:
        """Makes the table, [width, num]."""
        self.embedding = self.param("embedding", kernel_init, (self.width, self.num))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Looks up ids i32[...], giving [..., width]."""
        return jnp.moveaxis(jnp.take(self.embedding, ids, axis=1, mode="clip"), 0, -1)

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns x times the table: [..., width] -> f32[..., num]."""
        return as_kernel(self.embedding).dot(x, jnp.float32)


class MLP(nn.Module):
    """down(act(gate x) * up x) when gated, down(act(up x)) when not: [..., D] -> [..., D].

    What enters `down`, [..., F], is sown as `inner` among the "intermediates": callers that make these mutable get it
    beside the output, for all others it is not kept.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., D] to [..., D]."""
        width, bias, activation = self.config.width, self.config.bias, ACTIVATIONS[self.config.activation]
        inner = Linear(width, bias, name="up")(x)
        if self.config.gated:
            # A backward pass makes the product again from its two factors: nothing in between is kept.
            gated = jax.checkpoint(lambda gate, inner: activation(gate) * inner)
            inner = gated(Linear(width, bias, name="gate")(x), inner)
        else:
            inner = activation(inner)
        self.sow("intermediates", "inner", inner)
        return Linear(x.shape[-1], bias, name="down")(inner)


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Returns (f32[Dh/2] radians per position, factor on cos and sin) for a head of width `head_dim`."""
    inverse = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling is None:
        return inverse.astype(np.float32), 1.0
    stretched = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[rope.scaling.kind](inverse, rope, head_dim)
    return stretched.astype(np.float32), _attention_factor(rope.scaling)


def rotary_table(rope: RopeConfig, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), f32[B, T, 1, Dh/2], at `positions` i32[B, T]."""
    frequencies, factor = rotary_frequencies(rope, head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None, None]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [B, T, H, Dh] by a `rotary_table`; component i pairs with i + Dh/2 (the half-split order)."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@struct.dataclass
class RelativeBias:
    """What is added to attention scores by how far a key lies ahead of its query.

    Attributes:
        by_offset: f32[H, 2 M + 1], for offsets -M to M; beyond, the last of each side counts.
    """

    by_offset: jax.Array

    def __call__(self, offsets: jax.Array) -> jax.Array:
        """Returns f32[B, H, T, S] for offsets i32[B, T, S], key position minus query position."""
        most = self.by_offset.shape[1] // 2
        places = jnp.clip(offsets, -most, most) + most
        return jnp.moveaxis(jnp.take(self.by_offset.astype(jnp.float32), places, axis=1), 0, 1)


def relative_buckets(config: RelativeConfig) -> np.ndarray:
    """Returns i32[2 M + 1]: the bucket of each offset, key position minus query position, from -M to M.

    M is `max_distance`. Computed in float32, as T5 has it: a boundary may depend on it.
    """
    offsets = np.arange(-config.max_distance, config.max_distance + 1)
    num, ahead = config.num_buckets, 0
    if config.bidirectional:
        num //= 2
        ahead = num * (offsets > 0)
        distance = np.abs(offsets)
    else:
        distance = np.maximum(-offsets, 0)
    exact = num // 2
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(config.max_distance / exact)) * np.float32(num - exact)
    far = np.minimum(exact + steps.astype(np.int32), num - 1)
    return (ahead + np.where(distance < exact, distance, far)).astype(np.int32)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """Returns cap * tanh(x / cap), or x itself when there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the vector with x's dtype and rank, to be combined with x's last axis."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor


def _linear(inverse: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    return inverse / rope.scaling.factor


def _llama3(inverse: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    scaling = rope.scaling
    rotations = scaling.original_length * inverse / (2 * math.pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    keep = np.clip((rotations - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return inverse * (keep + (1 - keep) / scaling.factor)


def _yarn(inverse: np.ndarray, rope: RopeConfig, head_dim: int) -> np.ndarray:
    scaling = rope.scaling

    def dimension(rotations: float) -> float:
        """The (fractional) index whose frequency makes that many rotations over the original length."""
        ratio = scaling.original_length / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return inverse * ((1 - ramp) + ramp / scaling.factor)
