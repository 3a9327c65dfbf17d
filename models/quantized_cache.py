"""Keys and values of the cache in few bits.

A layer of the cache may hold `QuantizedSlots` in place of an array. `models.cache` writes and moves them, and
`gathered` reads chosen rows; nothing else of the cache needs to know. Attention policies that read all slots as one
array (dense and tree attention) do not take them.

Axis letters: B batch, S slots, K key/value heads, Dh head width, C bytes of a row's codes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from models.errors import InputError

_PARAMETERS = 4  # bytes of a row's scale and zero


@struct.dataclass
class QuantizedSlots:
    """Rows of Dh numbers, each number as an unsigned code: value = code * scale + zero (asymmetric, as in QServe,
    2405.04532, section 5.2), with a scale and a zero for each row, which is one head of one token.

    Attributes:
        rows: u8[B, K, S, C + 4]: the codes, then scale and zero (the row's lowest value), float16 in two bytes each.
            Of 4 bits, byte c holds the codes of c (low half) and c + Dh/2 (high half). One array, so that a row is
            read and written at once; and XLA's CPU backend copies whole arrays of float16 to write into them.
        bits: 4 or 8.
    """

    rows: jax.Array
    bits: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, S, Dh)."""
        return *self.rows.shape[:-1], (self.rows.shape[-1] - _PARAMETERS) * 8 // self.bits

    def values(self) -> jax.Array:
        """Returns f32[B, K, S, Dh]."""
        codes, bytes_ = self.rows[..., :-_PARAMETERS], self.rows[..., -_PARAMETERS:]
        pairs = jax.lax.bitcast_convert_type(bytes_.reshape(*bytes_.shape[:-1], 2, 2), jnp.float16)
        scale, zero = jnp.split(pairs.astype(jnp.float32), 2, axis=-1)
        if self.bits == 4:
            codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
        return codes.astype(jnp.float32) * scale + zero


def quantized(values: jax.Array, bits: int) -> QuantizedSlots:
    """Returns the codes of values [..., Dh], row by row; no value moves by more than half a scale (and float16's own
    rounding of scale and zero).

    Raises:
        InputError: bits other than 4 and 8, or an odd Dh for 4.
    """
    if bits not in (4, 8) or values.shape[-1] * bits % 8:
        raise InputError(f"a cache takes 4 or 8 bits (4 for heads of even width), got {bits}")
    values = values.astype(jnp.float32)
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    pair = jnp.concatenate([(high - low) / (2**bits - 1), low], axis=-1).astype(jnp.float16)
    step, zero = jnp.split(pair.astype(jnp.float32), 2, axis=-1)
    codes = jnp.round((values - zero) / jnp.where(step > 0, step, 1.0))
    codes = jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(codes, 2, axis=-1)
        codes = first | (second << 4)
    bytes_ = jax.lax.bitcast_convert_type(pair, jnp.uint8).reshape(*pair.shape[:-1], _PARAMETERS)
    return QuantizedSlots(jnp.concatenate([codes, bytes_], axis=-1), bits)


def stored_like(stored: jax.Array | QuantizedSlots, values: jax.Array) -> jax.Array | QuantizedSlots:
    """Returns values [..., Dh] in the form of what is stored: codes, or the array's dtype."""
    if isinstance(stored, QuantizedSlots):
        return quantized(values, stored.bits)
    return values.astype(stored.dtype)


def gathered(stored: jax.Array | QuantizedSlots, gather: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns what `gather` takes of [B, K, S, X] arrays, the last axis whole: of codes, as numbers."""
    taken = jax.tree.map(gather, stored)
    return taken.values() if isinstance(taken, QuantizedSlots) else taken
