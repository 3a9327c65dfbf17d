"""Flash decoding: every form against slow float64 loops, over dead slots full of garbage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.flash_decode import Partials, flash_decode, merge_partials, normalize, tpu
from tests.support.kernels import assert_part, bury, lower_for, normal, races_found, slow_rows

SCALE = 0.2
# dtype, K, R, S, Dh, lengths, whether rows start late, softcap, splits
CASES = {
    "one row": ("float32", 2, 1, 300, 64, (0, 1, 77, 300), False, None, None),
    "39 rows, late starts": ("float32", 1, 39, 256, 128, (255, 256, 129, 0), True, None, 2),
    "wide heads, cap": ("bfloat16", 1, 48, 300, 64, (300, 1, 0, 130), True, 3.0, None),
    "448 rows": ("bfloat16", 1, 448, 200, 256, (200, 77), False, None, None),
    "two blocks of rows": ("float32", 1, 520, 130, 64, (130,), True, 2.0, None),
    "splits that hold nothing": ("float32", 1, 6, 1100, 64, (3, 1100), True, None, 4),
}


def operands(name, seed=0):
    dtype, heads, rows, slots, head_dim, lengths, late, softcap, splits = CASES[name]
    rng, batch = np.random.default_rng(seed), len(lengths)
    q = normal(rng, dtype, batch, heads, rows, head_dim)
    lengths = jnp.asarray(lengths, jnp.int32)
    k, v = (bury(normal(rng, dtype, batch, heads, slots, head_dim), lengths) for _ in "kv")
    last = np.asarray(lengths)[:, None] + 3 if late else 1
    first = jnp.asarray(rng.integers(-5, last, (batch, rows)) if late else np.zeros((batch, rows)), jnp.int32)
    return (q, k, v, lengths), {"first": first if late else None, "softcap": softcap, "scale": SCALE, "splits": splits}


def check(part, args, options):
    """Compares a part with slow loops: what it normalizes to, and the weight with which it would be merged."""
    first = jnp.zeros(args[0].shape[::2], jnp.int32) if options["first"] is None else options["first"]
    out, lse = slow_rows(*args, first, SCALE, options["softcap"])
    assert_part(part, out, lse, args[0].dtype)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    args, options = operands(name)
    check(jax.jit(lambda *a: flash_decode(*a, **options, impl="xla"))(*args), args, options)


@pytest.mark.parametrize("name", CASES)
def test_kernel(name, form):
    args, options = operands(name)
    check(flash_decode(*args, **options, **form), args, options)


@pytest.mark.parametrize("name", ["39 rows, late starts", "two blocks of rows", "splits that hold nothing"])
def test_kernel_in_simulated_memory(name):
    args, options = operands(name)
    check(flash_decode(*args, **options, impl="pallas", interpret=compat.tpu_interpreter()), args, options)
    assert not races_found()


def test_kernel_reads_no_dead_value(form):
    (q, k, v, lengths), options = operands("one row")
    expected = flash_decode(q, k, v, lengths, **options, **form)
    got = flash_decode(q, bury(k, lengths, np.nan), bury(v, lengths, np.nan), lengths, **options, **form)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_splits_change_no_result(form):
    args, options = operands("splits that hold nothing")
    one, three = (flash_decode(*args, **options | {"splits": splits}, **form) for splits in (1, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one, three)


def test_rows_of_a_batch_do_not_interact(form):
    (q, k, v, lengths), options = operands("one row")
    together = flash_decode(q, k, v, lengths, **options, **form)
    other = flash_decode(q, k.at[1].set(5.0), v.at[1].set(-7.0), lengths.at[1].set(9), **options, **form)
    for a, b in zip(together, other, strict=True):
        np.testing.assert_array_equal(np.delete(a, 1, 0), np.delete(b, 1, 0))


def test_parts_merge_in_any_grouping():
    args, options = operands("39 rows, late starts")
    q, k, v, lengths = (x[:2] for x in args)
    options["first"] = options["first"][:2]

    def piece(begin, end):
        shifted = options | {"first": options["first"] - begin}
        return flash_decode(
            q, k[:, :, begin:end], v[:, :, begin:end], jnp.clip(lengths - begin, 0, end - begin), **shifted
        )

    def merge(*parts):
        return merge_partials(jax.tree.map(lambda *x: jnp.stack(x), *parts))

    a, b, c = piece(0, 100), piece(100, 101), piece(101, 256)
    for whole in (merge(a, b, c), merge(merge(a, b), c), merge(c, merge(b, a))):
        check(whole, (q, k, v, lengths), options)


def test_parts_that_saw_nothing_merge_to_zeros():
    args, options = operands("one row")
    nothing = flash_decode(*args[:3], jnp.zeros(4, jnp.int32), **options)
    both = merge_partials(jax.tree.map(lambda x: jnp.stack([x, x]), nothing))
    np.testing.assert_array_equal(normalize(both), 0.0)


def _forgets_to_rescale(part, *block, **options):
    new = tpu_absorb(Partials(jnp.zeros_like(part.o), part.m, part.l), *block, **options)
    return Partials(part.o + new.o, new.m, new.l)


def _sees_everything(part, q, k, v, visible, **options):
    return tpu_absorb(part, q, k, v, jnp.ones_like(visible), **options)


tpu_absorb = tpu.absorb_block


@pytest.mark.parametrize("bug", [_forgets_to_rescale, _sees_everything])
def test_a_planted_bug_is_caught(bug, monkeypatch):
    monkeypatch.setattr(tpu, "absorb_block", bug)
    args, options = operands("splits that hold nothing")
    part = flash_decode(*args, **options | {"splits": 1}, impl="pallas", interpret=True)
    with pytest.raises(AssertionError, match="Not equal|Mismatched"):
        check(part, args, options)


def test_a_planted_race_is_caught(monkeypatch, capsys):
    """The last axis adds up one output block: declared parallel, two cores would do so at once. One batch row alone, or
    each core would have a row of its own.
    """
    monkeypatch.setattr(compat, "tpu_params", lambda *_: of_axes(*["parallel"] * 4))
    args, options = operands("splits that hold nothing")
    options |= {"splits": 1, "first": options["first"][1:]}
    flash_decode(*(x[1:] for x in args), **options, impl="pallas", interpret=compat.tpu_interpreter())
    assert races_found() and "RACE" in capsys.readouterr().out


of_axes = compat.tpu_params


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize(("rows", "slots", "head_dim"), [(1, 128, 64), (39, 1000, 128), (448, 4096, 256)])
def test_lowering(platform, dtype, rows, slots, head_dim, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: {"cuda": "gpu"}.get(platform, platform))
    shapes = [(4, 2, rows, head_dim), (4, 2, slots, head_dim), (4, 2, slots, head_dim)]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (4, rows))]

    def run(q, k, v, lengths, first):
        return flash_decode(q, k, v, lengths, first=first, softcap=5.0, impl="pallas")

    lower_for(platform, run, *shapes, *integers)


BAD = {
    "impl": ({"impl": "triton"}, "impl is 'triton'; it must be one of auto, pallas, xla"),
    "no device": ({"impl": "pallas"}, "no kernel for the platform 'cpu'"),
    "interpret without a kernel": ({"interpret": True}, "Pass impl='pallas'"),
    "heads": ({"k": (2, 3, 200, 64)}, r"k has the shape \(2, 3, 200, 64\).*must be \(2, 2, 200, 64\)"),
    "values": ({"v": (2, 2, 199, 64)}, r"v has the shape \(2, 2, 199, 64\)"),
    "rank": ({"q_rows": (2, 5, 64)}, "four axes"),
    "lengths beyond": ({"lengths": [201, 3]}, "lengths holds 201; every length must be from 0 to the cache's 200"),
    "lengths below": ({"lengths": [7, -1]}, "lengths holds -1"),
    "lengths per row": ({"lengths": [7]}, r"lengths has the shape \(1,\)"),
    "first": ({"first": jnp.zeros((2, 4), jnp.int32)}, r"first has the shape \(2, 4\).*must be \(2, 5\)"),
    "float first": ({"first": jnp.zeros((2, 5))}, "first has the dtype float32; it must be int32"),
    "splits": ({"splits": 0}, "splits is 0; it must be at least 1"),
    "mixed dtypes": ({"q_dtype": "bfloat16"}, "q_rows bfloat16, k float32"),
    "integers": ({"q_dtype": "int32", "dtype": "int32"}, "one floating dtype"),
    "dtype without a kernel": (
        {"dtype": "float16", "q_dtype": "float16", "impl": "pallas", "interpret": True},
        "no kernel for dtype float16 .it must be one of float32, bfloat16",
    ),
    "head width without a kernel": (
        {"q_rows": (2, 2, 5, 80), "k": (2, 2, 200, 80), "v": (2, 2, 200, 80), "impl": "pallas", "interpret": True},
        "no kernel for head width 80",
    ),
    "too few slots": (
        {"k": (2, 2, 100, 64), "v": (2, 2, 100, 64), "lengths": [100, 3], "impl": "pallas", "interpret": True},
        "no kernel for 100 slots .it needs at least 128",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    bad, message = BAD[name]
    values = {"q_rows": (2, 2, 5, 64), "k": (2, 2, 200, 64), "v": (2, 2, 200, 64), "lengths": [200, 3]} | bad
    q_dtype, dtype = values.pop("q_dtype", "float32"), values.pop("dtype", "float32")
    q, k, v = values.pop("q_rows"), values.pop("k"), values.pop("v")
    lengths = jnp.asarray(values.pop("lengths"), jnp.int32)
    with pytest.raises(ValueError, match=message):
        flash_decode(jnp.zeros(q, q_dtype), jnp.zeros(k, dtype), jnp.zeros(v, dtype), lengths, **values)


def test_bad_shapes_are_told_at_trace_time():
    q, k = jnp.zeros((2, 2, 5, 64)), jnp.zeros((2, 3, 200, 64))
    with pytest.raises(ValueError, match="k has the shape"):
        jax.eval_shape(flash_decode, q, k, k, jnp.zeros(2, jnp.int32))
