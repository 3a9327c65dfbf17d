"""Causal attention over a prompt in which each key/value head reads its own list of blocks, all heads in one launch.

Queries and keys are cut into blocks of `block` positions. A dense head's query block i reads the key blocks 0 to i; a
streaming head's reads the first `sink` and the last `local` of these, its own among them. Inside a block attention is
causal, position by position. The list of a head needs no memory: its n-th entry is an expression of n, i, sink and
local (`lists.py`), as a list of every block of a long prompt would fill a chip's scalar memory.

Source: "LServe" (2502.14866), section 3.3.

Axis letters: B batch, T prompt positions, H query heads, K key/value heads, G = H/K, S cache slots, C positions of a
block, Dh head width.
"""

from collections.abc import Sequence

import jax

from pallas_kernels.block_sparse_prefill.gpu import block_sparse_prefill_gpu
from pallas_kernels.block_sparse_prefill.lists import HeadBlocks as HeadBlocks
from pallas_kernels.block_sparse_prefill.reference import block_sparse_prefill_reference
from pallas_kernels.block_sparse_prefill.tpu import MOST_ROWS, block_sparse_prefill_tpu
from pallas_kernels.compat import Interpret
from pallas_kernels.dispatch import (
    check_integers,
    check_lengths,
    check_one_dtype,
    check_shape,
    choose_form,
    unserved_by_kernels,
)

BLOCKS = (64, 128, 256)  # positions of a block that kernels take
_FORMS = {"xla": block_sparse_prefill_reference, "tpu": block_sparse_prefill_tpu, "gpu": block_sparse_prefill_gpu}


def block_sparse_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    heads: Sequence[HeadBlocks | None],
    *,
    block: int = 128,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    interpret: Interpret = False,
) -> jax.Array:
    """Returns what each position of a prompt reads: [B, T, H, Dh] in q's dtype, zeros from a row's length on.

    Args:
        q: [B, T, H, Dh], rotated; head h reads key/value head h // G.
        k: [B, K, S, Dh], S at least T, slot i holding position i.
        v: [B, K, S, Dh]; dead slots must be finite.
        lengths: i32[B], 0 to T, the positions of each prompt.
        heads: for each key/value head which blocks it reads: None for all, or a streaming head's `HeadBlocks`.
        block: C; kernels take 64, 128 and 256.
        scale: factor of the scores; None for Dh ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None for no cap.
        impl: "xla", "pallas", or "auto" for what was measured to be faster here.
        interpret: run the kernel without its device, slowly, for tests; needs impl="pallas".

    Raises:
        ValueError: heads that K does not divide, a list for other than K heads, shapes or dtypes that do not fit,
            lengths beyond the prompt, an `impl` that is unknown or has no kernel for these operands.
    """
    _check(q, k, v, lengths, heads, block)
    group, head_dim, num_slots = q.shape[2] // k.shape[1], q.shape[3], k.shape[2]
    unserved = unserved_by_kernels(q.dtype, head_dim, num_slots)
    if block not in BLOCKS:
        unserved = f"blocks of {block} positions (it must be one of {', '.join(map(str, BLOCKS))})"
    elif num_slots < block:
        unserved = f"{num_slots} slots (it needs a whole block of {block})"
    elif group * block > MOST_ROWS:
        unserved = f"{group} heads of a group in blocks of {block} (the two may multiply to {MOST_ROWS} at most)"
    form = choose_form("block_sparse_prefill", impl, interpret, num_slots, unserved)
    everything = HeadBlocks(0, -(-num_slots // block))
    heads = [everything if blocks is None else blocks for blocks in heads]
    options = {"block": block, "scale": head_dim**-0.5 if scale is None else scale, "softcap": softcap}
    if form != "xla":
        options["interpret"] = interpret
    return _FORMS[form](q, k, v, lengths, heads, **options)


def _check(q, k, v, lengths, heads, block) -> None:
    """Raises ValueError on arguments that do not fit each other."""
    for name, value in {"q": q, "k": k}.items():
        if value.ndim != 4:
            raise ValueError(f"{name} has the shape {value.shape}; it must have four axes.")
    (batch, num_positions, num_heads, head_dim), (kv_heads, num_slots) = q.shape, k.shape[1:3]
    if num_heads % kv_heads:
        raise ValueError(f"q has {num_heads} heads and k has {kv_heads}; the second must divide the first.")
    if num_slots < num_positions:
        raise ValueError(f"q has {num_positions} positions and k {num_slots} slots; there must be a slot for each.")
    check_shape("k", k, (batch, kv_heads, num_slots, head_dim), "B, K, S, Dh")
    check_shape("v", v, k.shape, "B, K, S, Dh")
    check_one_dtype(q=q, k=k, v=v)
    check_shape("lengths", lengths, (batch,), "B")
    check_integers("lengths", lengths)
    check_lengths(lengths, num_positions)
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1.")
    if len(heads) != kv_heads:
        raise ValueError(f"heads has {len(heads)} entries; it must have one for each of the {kv_heads} heads of k.")
    for index, blocks in enumerate(heads):
        if blocks is not None and (blocks.sink < 0 or blocks.local < 1):
            raise ValueError(f"heads[{index}] is {blocks}; sink must be at least 0 and local at least 1.")
