"""Attention over chosen slots: every form against slow float64 loops that mask all other slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels import selected_attention as room
from pallas_kernels.flash_decode import flash_decode
from pallas_kernels.selected_attention import selected_attention
from tests.support.kernels import assert_part, lower_for, normal, races_found, slow_rows

SCALE = 0.2
# dtype, B, K, lists of a head, R, S, Dh, X, splits
CASES = {
    "one list": ("float32", 2, 2, 1, 3, 150, 64, 20, None),
    "a list for each of six heads": ("bfloat16", 1, 1, 6, 6, 130, 128, 40, 2),
    "a list for each of seven rows": ("float32", 1, 1, 7, 7, 200, 256, 150, 2),
}


def operands(name, seed=0):
    """Slots in random order; of half of them nothing is seen, and of the last list nothing at all."""
    dtype, batch, heads, lists, rows, num_slots, head_dim, count, splits = CASES[name]
    rng = np.random.default_rng(seed)
    q = normal(rng, dtype, batch, heads, rows, head_dim)
    k, v = (normal(rng, dtype, batch, heads, num_slots, head_dim) for _ in "kv")
    slots = np.stack([rng.permutation(num_slots)[:count] for _ in range(batch * heads * lists)])
    slots = slots.reshape(batch, heads * lists, count).astype(np.int32)
    visible = rng.random(slots.shape) < 0.5
    visible[-1, -1] = False
    slots[0, 0, :3] = -1
    return (q, k, v, jnp.asarray(slots)), {"visible": jnp.asarray(visible), "scale": SCALE, "splits": splits}


def check(part, args, options):
    q, k, v, slots = args
    (batch, heads, rows, _), num_slots = q.shape, k.shape[2]
    chosen = np.where(options["visible"], slots, -1)
    listed = (chosen[:, :, :, None] == np.arange(num_slots)).any(axis=2).reshape(batch, heads, -1, num_slots)
    listed = np.repeat(listed, rows // listed.shape[2], axis=2)
    first, lengths = np.zeros((batch, rows), np.int32), np.full(batch, num_slots)
    out, lse = slow_rows(q, k, v, lengths, first, SCALE, None, listed)
    assert np.isinf(lse).any()
    assert_part(part, out, lse, q.dtype)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    args, options = operands(name)
    check(jax.jit(lambda *a: selected_attention(*a, **options))(*args), args, options)


@pytest.mark.parametrize("name", CASES)
def test_kernel(name, form):
    args, options = operands(name)
    check(selected_attention(*args, **options, **form), args, options)


def test_kernel_in_simulated_memory():
    args, options = operands("one list")
    check(selected_attention(*args, **options, impl="pallas", interpret=compat.tpu_interpreter()), args, options)
    assert not races_found()


def test_all_slots_in_any_order_are_the_whole_cache(form):
    (q, k, v, _), _ = operands("one list")
    slots = jnp.asarray(np.random.default_rng(1).permutation(150), jnp.int32)
    got = selected_attention(q, k, v, jnp.broadcast_to(slots, (2, 2, 150)), **form)
    whole = flash_decode(q, k, v, jnp.full(2, 150, jnp.int32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, whole)


HEADS = (2, 0)  # of three


def some_heads(seed: int = 0):
    """Returns operands of three heads, and those of `HEADS` alone."""
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, "float32", 2, 3, size, 64) for size in (4, 150, 150))
    slots = jnp.asarray(rng.permuted(np.tile(np.arange(150, dtype=np.int32), (2, 4, 1)), axis=2)[:, :, :20])
    read = q[:, HEADS, :]
    return (read, k, v, slots), (read, k[:, HEADS, :], v[:, HEADS, :], slots)


def test_lists_of_some_heads(form):
    args, alone = some_heads()
    for options in ({}, form):
        got = selected_attention(*args, heads=HEADS, **options)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, selected_attention(*alone)
        )


def test_rows_of_a_list_may_see_different_slots():
    (q, k, v, slots), _ = some_heads()
    visible = jnp.asarray(np.random.default_rng(1).random((2, 4, 2, 20)) < 0.5)
    got = selected_attention(q, k, v, slots, visible=visible, heads=HEADS)
    lists, seen = jnp.repeat(slots, 2, axis=1), visible.reshape(2, 8, 20)
    expected = selected_attention(q, k, v, lists, visible=seen, heads=HEADS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    with pytest.raises(ValueError, match="no kernel for rows of one list that see different slots"):
        selected_attention(q, k, v, slots, visible=visible, heads=HEADS, impl="pallas", interpret=True)


def test_other_slots_are_not_read(form):
    """What stands in them may be NaN."""
    (q, k, v, slots), options = operands("one list")
    chosen = np.where(options["visible"], slots, -1)
    listed = (chosen[:, :, :, None] == np.arange(150)).any(axis=2)[..., None]
    expected = selected_attention(q, *(jnp.where(listed, x, 0.0) for x in (k, v)), slots, **options, **form)
    got = selected_attention(q, *(jnp.where(listed, x, np.nan) for x in (k, v)), slots, **options, **form)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_planted_bug_is_caught(monkeypatch):
    """Slots that are not seen stay where they are, before others that are."""
    count = lambda slots: jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)  # noqa: E731
    padded = lambda slots: jnp.pad(jnp.maximum(slots, 0), ((0, 0), (0, 128)))  # noqa: E731
    monkeypatch.setattr(room, "_compact", lambda slots: (padded(slots), count(slots)))
    args, options = operands("one list")
    with pytest.raises(AssertionError, match="Not equal"):
        check(selected_attention(*args, **options, impl="pallas", interpret=True), args, options)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize(("rows", "lists", "head_dim", "count"), [(1, 1, 64, 50), (42, 6, 128, 1000)])
def test_lowering(platform, dtype, rows, lists, head_dim, count, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: {"cuda": "gpu"}.get(platform, platform))
    shapes = [jax.ShapeDtypeStruct((4, 2, n, head_dim), dtype) for n in (rows, 5000, 5000)]
    slots = [jax.ShapeDtypeStruct((4, 2 * lists, count), kind) for kind in (jnp.int32, jnp.bool_)]

    def run(q, k, v, slots, visible):
        return selected_attention(q, k, v, slots, visible=visible, impl="pallas")

    lower_for(platform, run, *shapes, *slots)


def integers(*shape, fill=0):
    return jnp.full(shape, fill, jnp.int32)


BAD = {
    "rank": ({"q_rows": jnp.zeros((2, 6, 64))}, "four axes"),
    "heads of q": (
        {"q_rows": jnp.zeros((2, 3, 6, 64))},
        r"k has the shape \(2, 2, 200, 64\).*must be \(2, 3, 200, 64\)",
    ),
    "lists": ({"slots": integers(2, 3, 4)}, r"slots has 3 lists; there must be K \(2\)"),
    "lists that rows cannot share": ({"slots": integers(2, 8, 4)}, "divides the 6 rows"),
    "no slot": ({"slots": integers(2, 2, 0)}, "X above 0"),
    "floats": ({"slots": jnp.zeros((2, 2, 4))}, "slots has the dtype float32; it must be int32"),
    "beyond": ({"slots": integers(2, 2, 4, fill=200)}, "slots holds 200; every number must be below the cache's 200"),
    "visible": ({"visible": jnp.ones((2, 1, 4), bool)}, r"visible has the shape \(2, 1, 4\).*must be \(2, 2, 4\)"),
    "visible of rows": ({"visible": jnp.ones((2, 2, 5, 4), bool)}, r"visible has the shape .*must be \(2, 2, 6, 4\)"),
    "heads": ({"heads": (0, 2)}, r"heads is \[0, 2\]; it must name one of the 2 heads of k"),
    "visible as numbers": ({"visible": integers(2, 2, 4)}, "visible has the dtype int32; it must be bool"),
    "splits": ({"splits": 0}, "splits is 0"),
    "mixed dtypes": ({"v": jnp.zeros((2, 2, 200, 64), jnp.bfloat16)}, "v bfloat16"),
    "head width without a kernel": (
        {n: jnp.zeros((2, 2, s, 80)) for n, s in (("q_rows", 6), ("k", 200), ("v", 200))}
        | {"impl": "pallas", "interpret": True},
        "no kernel for head width 80",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    bad, message = BAD[name]
    good = {"q_rows": jnp.zeros((2, 2, 6, 64)), "k": jnp.zeros((2, 2, 200, 64)), "v": jnp.zeros((2, 2, 200, 64))}
    with pytest.raises(ValueError, match=message):
        selected_attention(**good | {"slots": integers(2, 2, 4)} | bad)
