"""Attention over lists of chosen slots: the cost grows with the lists, not with the cache.

On a GPU the kernel gathers the rows of keys and values by the list. A TPU moves whole tiles, of 8 or 16 rows, and its
kernels cannot gather single ones: there XLA gathers the visible slots into a compact cache, in rising order, and
`flash_decode`'s kernel reads that. So on a TPU the chosen keys and values are moved twice; choose pages of 16 slots or
more (`flash_decode(pages=...)`) where that matters.

Source of the use: "TidalDecode" (2410.05076), where a few layers choose the slots for all others.

Axis letters: B batch, K key/value heads, J lists, R rows of queries, S cache slots, X slots of a list, Dh head width,
N = B*J.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from pallas_kernels.compat import Interpret
from pallas_kernels.dispatch import (
    LEAST_SLOTS,
    check_below,
    check_integers,
    check_one_dtype,
    check_shape,
    choose_form,
    unserved_by_kernels,
)
from pallas_kernels.flash_decode import Partials, merge_partials
from pallas_kernels.flash_decode.listed_gpu import listed_partials_gpu
from pallas_kernels.flash_decode.reference import gather_slots, listed_partials
from pallas_kernels.flash_decode.tpu import flash_decode_tpu


def selected_attention(
    q_rows: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    visible: jax.Array | None = None,
    splits: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    interpret: Interpret = False,
) -> Partials:
    """Returns attention over listed slots as a part, to be merged with others (`merge_partials`) or normalized.

    Args:
        q_rows: [B, K, R, Dh]: all rows that read key/value head k, rotated.
        k: [B, K, S, Dh] keys.
        v: [B, K, S, Dh] values, finite.
        slots: i32[B, J, X]; a slot that is negative or not below S stands for none, and no slot may stand in a list
            twice. J is K, or a multiple of it: then each key/value head has several lists, which serve equal runs of
            its R rows. (With rows in the order (g, t), J = K*G gives each query head a list, J = K*R each row.)
        visible: bool[B, J, X], which of the slots are seen; None for all.
        splits: see `flash_decode`.
        scale: factor of the scores; None for Dh ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None for no cap.
        impl: "xla", "pallas" or "auto"; see `flash_decode`.
        interpret: see `flash_decode`.

    Returns:
        Partials with o f32[B, K, R, Dh], not divided by l; m and l f32[B, K, R].

    Raises:
        ValueError: shapes or dtypes that do not fit, slots beyond the cache, splits below 1, an `impl` that is unknown
            or has no kernel for these operands.
    """
    _check(q_rows, k, v, slots, visible, splits)
    (batch, heads, num_rows, head_dim), num_slots = q_rows.shape, k.shape[2]
    form = choose_form(
        "selected_attention", impl, interpret, slots.shape[2], unserved_by_kernels(k.dtype, head_dim, num_slots)
    )
    options = {"scale": head_dim**-0.5 if scale is None else scale, "softcap": softcap}
    seen = slots < num_slots if visible is None else visible & (slots < num_slots)
    slots = rearrange(jnp.where(seen, slots, -1), "b j x -> (b j) x")
    q = rearrange(q_rows, "b k (j r) d -> (b k j) r d", j=len(slots) // (batch * heads))
    k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (k, v))
    first = jnp.zeros(q.shape[:2], jnp.int32)
    if form == "xla":
        part = listed_partials(q, k, v, slots, first, **options)
    elif form == "gpu":
        counts = jnp.full(len(slots), slots.shape[1], jnp.int32)
        options |= {"splits": splits, "interpret": interpret}
        part = merge_partials(listed_partials_gpu(q, k, v, slots, counts, first, **options))
    else:
        slots, counts = _compact(slots)
        keys, values = gather_slots(k, slots), gather_slots(v, slots)
        options |= {"splits": splits, "interpret": interpret}
        part = merge_partials(flash_decode_tpu(q, keys, values, counts, first, **options))
    return jax.tree.map(lambda x: x.reshape(batch, heads, num_rows, *x.shape[2:]), part)


def _compact(slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the slots of each list, i32[N, X or 128], in rising order and before all that stand for none (then 0),
    and how many they are, i32[N].
    """
    beyond = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(slots < 0, beyond, slots), axis=1)
    spare = max(0, LEAST_SLOTS - slots.shape[1])
    ordered = jnp.pad(jnp.where(ordered == beyond, 0, ordered), ((0, 0), (0, spare)))
    return ordered, jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)


def _check(q_rows, k, v, slots, visible, splits) -> None:
    """Raises ValueError on shapes, dtypes and slots that do not fit."""
    for name, value in {"q_rows": q_rows, "k": k}.items():
        if value.ndim != 4:
            raise ValueError(f"{name} has the shape {value.shape}; it must have the four axes of [B, K, rows, Dh].")
    batch, heads, num_rows, head_dim = q_rows.shape
    num_slots = k.shape[2]
    check_shape("k", k, (batch, heads, num_slots, head_dim), "B, K, S, Dh")
    check_shape("v", v, k.shape, "B, K, S, Dh")
    check_one_dtype(q_rows=q_rows, k=k, v=v)
    if slots.ndim != 3 or slots.shape[0] != batch or not slots.shape[2]:
        raise ValueError(f"slots has the shape {slots.shape}; it must be [B, J, X] with B {batch} and X above 0.")
    lists = slots.shape[1]
    if not lists or lists % heads or num_rows % (lists // heads):
        raise ValueError(
            f"slots has {lists} lists; there must be K ({heads}) of them, or as many times K as divides the {num_rows} "
            f"rows of a key/value head."
        )
    check_integers("slots", slots)
    check_below("slots", slots, num_slots, "slots")
    if visible is not None:
        check_shape("visible", visible, slots.shape, "B, J, X")
        if visible.dtype != bool:
            raise ValueError(f"visible has the dtype {visible.dtype}; it must be bool.")
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}; it must be at least 1, or None.")
