"""Attention of a token tree and a committed cache: flash decoding over the cache, a small block of the tree, a merge.

The cache is shown up to a length, which needs no mask; only the [W, W] block of the tree has an arbitrary one. Heads of
one group and new rows are folded into rows, row g*T + t, so that each key/value head is read once. The block and the
merge are a few small operations that XLA fuses on every platform; what has a form per platform is `flash_decode`.

Axis letters: B batch, T new rows of the tree, W rows of the tree, H query heads, K key/value heads, G = H/K, S cache
slots, Dh head width, N = B*K, R = G*T.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from pallas_kernels.compat import Interpret
from pallas_kernels.dispatch import check_integers, check_one_dtype, check_shape, kernel_wins
from pallas_kernels.flash_decode import Partials, flash_decode, merge_partials, normalize
from pallas_kernels.flash_decode.reference import masked_partials

MOST_WIDTH = 256  # beyond, the block of the tree is no longer small beside the cache


def tree_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tree_k: jax.Array,
    tree_v: jax.Array,
    lengths: jax.Array,
    ancestors: jax.Array,
    *,
    depth: jax.Array | None = None,
    window: int | None = None,
    pages: jax.Array | None = None,
    page_size: int | None = None,
    heads: Sequence[int] | None = None,
    splits: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    interpret: Interpret = False,
) -> jax.Array:
    """Returns what each new row of a tree reads from the committed slots and from its own ancestors.

    A tree may be read in one pass (T = W) or level by level: the T new rows are then the last T of the W rows.

    Args:
        q: [B, T, H, Dh], rotated with position length + depth; head h reads key/value head h // G.
        k: [B, K, S, Dh] committed keys; what stands from the length on is not read.
        v: [B, K, S, Dh] committed values; dead slots must be finite.
        tree_k: [B, K, W, Dh] keys of the tree's rows.
        tree_v: [B, K, W, Dh] values of the tree's rows, finite.
        lengths: i32[B], 0 to S, the committed slots of each batch row; slot i holds position i.
        ancestors: bool[B or 1, T, W]; [i, j] is true when row j of the tree is new row i itself or an ancestor of it.
            A row that is padding may see nothing; it returns zeros if nothing is committed either.
        depth: i32[B or 1, W], each row's distance from the length; needed with a window, and not used without.
        window: a row at position p sees positions p - window + 1 to p; None for all.
        pages: i32[B, J, X], the pages that are read of the committed slots; J is K, or K*G with a list for each query
            head. None for all. See `flash_decode`, which is given them with the next two.
        page_size: slots of a page.
        heads: the heads of k and v that are read; tree_k and tree_v have these alone.
        splits: see `flash_decode`.
        scale: factor of the scores; None for Dh ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None for no cap.
        impl: "xla", "pallas" or "auto"; see `flash_decode`.
        interpret: see `flash_decode`.

    Returns:
        [B, T, H, Dh] in q's dtype.

    Raises:
        ValueError: heads that K does not divide, a tree wider than 256 rows, a window without depth, shapes or dtypes
            that do not fit, and what `flash_decode` refuses.
    """
    _check(q, k, v, tree_k, tree_v, lengths, ancestors, depth, window, heads)
    num_new, group = q.shape[1], q.shape[2] // tree_k.shape[1]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    rows = rearrange(q, "b t (k g) d -> b k (g t) d", g=group)
    first = None
    if window is not None:
        position = lengths[:, None] + depth[:, -num_new:]
        first = jnp.tile(position - (window - 1), (1, group))
        ancestors = ancestors & (depth[:, None, :] > depth[:, -num_new:, None] - window)
    options = {"scale": scale, "softcap": softcap}
    if impl == "auto" and pages is None:
        impl = "pallas" if kernel_wins("tree_attention", k.dtype, k.shape[3], k.shape[2]) else "xla"
    listed = {"pages": pages, "page_size": page_size, "heads": heads, "splits": splits}
    committed = flash_decode(rows, k, v, lengths, first=first, impl=impl, interpret=interpret, **listed, **options)
    tree = _tree_part(rows, tree_k, tree_v, ancestors, **options)
    parts = jax.tree.map(lambda *parts: jnp.stack(parts), committed, tree)
    out = normalize(merge_partials(parts))
    return rearrange(out, "b k (g t) d -> b t (k g) d", t=num_new).astype(q.dtype)


def _tree_part(rows, tree_k, tree_v, ancestors, *, scale, softcap) -> Partials:
    """Returns the part of the tree's own keys: rows [B, K, R, Dh], ancestors bool[B or 1, T, W]."""
    batch, heads, num_rows, _ = rows.shape
    visible = jnp.broadcast_to(ancestors, (batch, *ancestors.shape[1:]))
    visible = repeat(visible, "b t w -> (b k) (g t) w", k=heads, g=num_rows // ancestors.shape[1])
    q, k, v = (rearrange(x, "b k s d -> (b k) s d") for x in (rows, tree_k, tree_v))
    part = masked_partials(q, k, v, visible, scale=scale, softcap=softcap)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), part)


def _check(q, k, v, tree_k, tree_v, lengths, ancestors, depth, window, read) -> None:
    """Raises ValueError on what `flash_decode` would not see, or would tell in other words."""
    for name, value in {"q": q, "k": k, "tree_k": tree_k}.items():
        if value.ndim != 4:
            raise ValueError(f"{name} has the shape {value.shape}; it must have four axes.")
    (batch, num_new, num_heads, head_dim), width = q.shape, tree_k.shape[2]
    heads = k.shape[1] if read is None else len(read)
    if num_heads % heads:
        raise ValueError(f"q has {num_heads} heads and k has {heads}; the second must divide the first.")
    if width > MOST_WIDTH:
        raise ValueError(
            f"the tree has {width} rows; it may have at most {MOST_WIDTH}. Read a longer text as a prompt."
        )
    if num_new > width:
        raise ValueError(f"q has {num_new} rows and the tree {width}; the new rows must be among the tree's.")
    check_shape("lengths", lengths, (batch,), "B")
    check_integers("lengths", lengths)
    check_shape("k", k, (batch, k.shape[1], k.shape[2], head_dim), "B, K, S, Dh")
    check_shape("tree_k", tree_k, (batch, heads, width, head_dim), "B, K, W, Dh")
    check_shape("tree_v", tree_v, tree_k.shape, "B, K, W, Dh")
    check_one_dtype(q=q, k=k, v=v, tree_k=tree_k, tree_v=tree_v)
    trees = 1 if ancestors.shape[:1] == (1,) else batch
    check_shape("ancestors", ancestors, (trees, num_new, width), "B or 1, T, W")
    if ancestors.dtype != bool:
        raise ValueError(f"ancestors has the dtype {ancestors.dtype}; it must be bool.")
    if window is None:
        return
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, or None.")
    if depth is None:
        raise ValueError(f"window is {window} and depth is None: a window needs the depth of each row of the tree.")
    check_shape("depth", depth, (1 if depth.shape[:1] == (1,) else batch, width), "B or 1, W")
    check_integers("depth", depth)
