"""Flash decoding: a few rows of queries against the long cache of each key/value head, in parts that can be merged.

Read `partials.py` for the arithmetic, `reference.py` for the meaning, then `tpu.py` and `gpu.py`.

Axis letters: B batch, K key/value heads, R rows of queries (heads of a group times new tokens), S cache slots, Dh head
width, N = B*K, P splits.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.compat import Interpret
from pallas_kernels.dispatch import (
    check_integers,
    check_lengths,
    check_one_dtype,
    check_shape,
    choose_form,
    unserved_by_kernels,
)
from pallas_kernels.flash_decode.gpu import flash_decode_gpu
from pallas_kernels.flash_decode.partials import Partials as Partials
from pallas_kernels.flash_decode.partials import merge_partials as merge_partials
from pallas_kernels.flash_decode.partials import normalize as normalize
from pallas_kernels.flash_decode.reference import flash_decode_reference
from pallas_kernels.flash_decode.tpu import flash_decode_tpu

_KERNELS = {"tpu": flash_decode_tpu, "gpu": flash_decode_gpu}


def flash_decode(
    q_rows: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    first: jax.Array | None = None,
    splits: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    interpret: Interpret = False,
) -> Partials:
    """Returns attention over the live slots of a cache as a part, to be merged with others or normalized.

    Row r of batch row b sees the slots first[b, r] to lengths[b] - 1, in every key/value head.

    Args:
        q_rows: [B, K, R, Dh]: all rows that read key/value head k, rotated.
        k: [B, K, S, Dh] keys.
        v: [B, K, S, Dh] values; dead slots must be finite.
        lengths: i32[B], 0 to S, the live slots of each batch row.
        first: i32[B, R], the first slot that each row sees: its position - window + 1 for a sliding window, where a
            negative number means 0. None shows all live slots.
        splits: into how many parts a kernel cuts the slots, which it computes side by side; changes no result. None
            leaves it to the kernel.
        scale: factor of the scores; None for Dh ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None for no cap.
        impl: "xla", "pallas", or "auto" for what was measured to be faster here.
        interpret: run the kernel without its device, slowly, for tests; needs impl="pallas".

    Returns:
        Partials with o f32[B, K, R, Dh], not divided by l; m and l f32[B, K, R].

    Raises:
        ValueError: shapes or dtypes that do not fit, lengths beyond the cache, splits below 1, an `impl` that is
            unknown or has no kernel for these operands.
    """
    (batch, heads, num_rows, head_dim), num_slots = _check(q_rows, k, v, lengths, first, splits)
    form = choose_form("flash_decode", impl, interpret, num_slots, unserved_by_kernels(k.dtype, head_dim, num_slots))
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (q_rows, k, v))
    lengths = jnp.repeat(lengths, heads)
    if first is not None:
        first = jnp.repeat(jnp.maximum(first, 0), heads, axis=0)
    if form == "xla":
        part = flash_decode_reference(q, k, v, lengths, first, scale=scale, softcap=softcap)
    else:
        first = jnp.zeros((batch * heads, num_rows), jnp.int32) if first is None else first
        options = {"splits": splits, "scale": scale, "softcap": softcap, "interpret": interpret}
        part = merge_partials(_KERNELS[form](q, k, v, lengths, first, **options))
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), part)


def _check(q_rows, k, v, lengths, first, splits) -> tuple[tuple[int, int, int, int], int]:
    """Returns (B, K, R, Dh), S, or raises ValueError."""
    for name, value in {"q_rows": q_rows, "k": k}.items():
        if value.ndim != 4:
            raise ValueError(f"{name} has the shape {value.shape}; it must have the four axes of [B, K, rows, Dh].")
    batch, heads, num_rows, head_dim = q_rows.shape
    num_slots = k.shape[2]
    check_shape("k", k, (batch, heads, num_slots, head_dim), "B, K, S, Dh")
    check_shape("v", v, k.shape, "B, K, S, Dh")
    check_shape("lengths", lengths, (batch,), "B")
    check_integers("lengths", lengths)
    check_one_dtype(q_rows=q_rows, k=k, v=v)
    check_lengths(lengths, num_slots)
    if first is not None:
        check_shape("first", first, (batch, num_rows), "B, R")
        check_integers("first", first)
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}; it must be at least 1, or None.")
    return (batch, heads, num_rows, head_dim), num_slots
