"""Attention over lists of chosen slots: the cost grows with the lists, not with the cache.

On a GPU the kernel gathers the rows of keys and values by the list. A TPU moves whole tiles, of 8 or 16 rows, and its
kernels cannot gather single ones: there XLA gathers the visible slots into a compact cache, in rising order, and
`flash_decode`'s kernel reads that. So on a TPU the chosen keys and values are moved twice; choose pages of 16 slots or
more (`flash_decode(pages=...)`) where that matters.

Kernels show all rows of a list the same slots; XLA's form may show each row its own.

Source of the use: "TidalDecode" (2410.05076), where a few layers choose the slots for all others.

Axis letters: B batch, K key/value heads, J lists, R rows of queries, L = R*K/J rows of a list, S cache slots, X slots
of a list, Dh head width, N = B*J.
"""

from collections.abc import Sequence

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
from pallas_kernels.flash_decode import Partials, list_heads, merge_partials
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
    heads: Sequence[int] | None = None,
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
            twice, unless hidden. J is K, or a multiple of it: then each key/value head has several lists, which serve
            equal runs of its R rows. (With rows in the order (g, t), J = K*G gives each query head a list, J = K*R each
            row.)
        visible: bool[B, J, X], which of the slots are seen; or bool[B, J, L, X], by each row of a list, for which there
            is no kernel; None for all.
        heads: the heads of k and v that are read, in this order: everywhere else K is then their number. None for all.
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
    _check(q_rows, k, v, slots, visible, splits, heads)
    read = list_heads(heads, slots.shape[1], q_rows, k)
    num_slots, head_dim = k.shape[2:]
    unserved = unserved_by_kernels(k.dtype, head_dim, num_slots)
    if visible is not None and visible.ndim == 4:
        unserved = "rows of one list that see different slots"
    form = choose_form("selected_attention", impl, interpret, slots.shape[2], unserved)
    options = {"scale": head_dim**-0.5 if scale is None else scale, "softcap": softcap}
    there = (slots >= 0) & (slots < num_slots)
    q = rearrange(q_rows, "b k (j r) d -> (b k j) r d", j=read.each)
    k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (k, v))
    if form == "xla":
        seen = (
            there[:, :, None]
            if visible is None
            else there[:, :, None] & visible.reshape(*slots.shape[:2], -1, slots.shape[2])
        )
        slots, seen = rearrange(slots, "b j x -> (b j) x"), rearrange(seen, "b j r x -> (b j) r x")
        part = listed_partials(q, k, v, slots, read.table(len(q_rows)), seen, **options)
    else:
        seen = there if visible is None else there & visible
        slots = rearrange(jnp.where(seen, slots, -1), "b j x -> (b j) x")
        part = _KERNELS[form](q, k, v, slots, read, options | {"splits": splits, "interpret": interpret})
    return jax.tree.map(lambda x: x.reshape(*q_rows.shape[:3], *x.shape[2:]), part)


def _on_gpu(q, k, v, slots, heads, options) -> Partials:
    """Returns the part of slots i32[N, X], negative ones for none."""
    counts, first = jnp.full(len(slots), slots.shape[1], jnp.int32), jnp.zeros(q.shape[:2], jnp.int32)
    return merge_partials(listed_partials_gpu(q, k, v, slots, counts, first, heads, **options))


def _on_tpu(q, k, v, slots, heads, options) -> Partials:
    """Returns the part of slots i32[N, X], negative ones for none."""
    table = heads.table(len(slots) // (len(heads.heads) * heads.each))
    (slots, counts), first = _compact(slots), jnp.zeros(q.shape[:2], jnp.int32)
    keys, values = gather_slots(k, slots, table), gather_slots(v, slots, table)
    return merge_partials(flash_decode_tpu(q, keys, values, counts, first, **options))


_KERNELS = {"gpu": _on_gpu, "tpu": _on_tpu}


def _compact(slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the slots of each list, i32[N, X or 128], in rising order and before all that stand for none (then 0),
    and how many they are, i32[N].
    """
    beyond = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(slots < 0, beyond, slots), axis=1)
    spare = max(0, LEAST_SLOTS - slots.shape[1])
    ordered = jnp.pad(jnp.where(ordered == beyond, 0, ordered), ((0, 0), (0, spare)))
    return ordered, jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)


def _check(q_rows, k, v, slots, visible, splits, heads) -> None:
    """Raises ValueError on shapes, dtypes and slots that do not fit."""
    for name, value in {"q_rows": q_rows, "k": k}.items():
        if value.ndim != 4:
            raise ValueError(f"{name} has the shape {value.shape}; it must have the four axes of [B, K, rows, Dh].")
    batch, num_heads, num_rows, head_dim = q_rows.shape
    num_slots = k.shape[2]
    check_shape("k", k, (batch, num_heads if heads is None else k.shape[1], num_slots, head_dim), "B, K, S, Dh")
    check_shape("v", v, k.shape, "B, K, S, Dh")
    check_one_dtype(q_rows=q_rows, k=k, v=v)
    if slots.ndim != 3 or slots.shape[0] != batch or not slots.shape[2]:
        raise ValueError(f"slots has the shape {slots.shape}; it must be [B, J, X] with B {batch} and X above 0.")
    lists = slots.shape[1]
    if not lists or lists % num_heads or num_rows % (lists // num_heads):
        raise ValueError(
            f"slots has {lists} lists; there must be K ({num_heads}) of them, or as many times K as divides the "
            f"{num_rows} rows of a key/value head."
        )
    check_integers("slots", slots)
    check_below("slots", slots, num_slots, "slots")
    if visible is not None:
        by_row = (batch, lists, num_rows * num_heads // lists, slots.shape[2])
        check_shape("visible", visible, *((by_row, "B, J, L, X") if visible.ndim == 4 else (slots.shape, "B, J, X")))
        if visible.dtype != bool:
            raise ValueError(f"visible has the dtype {visible.dtype}; it must be bool.")
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}; it must be at least 1, or None.")
