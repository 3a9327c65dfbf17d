"""Flash decoding over listed pages: every form against slow float64 loops that mask all other slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.flash_decode import flash_decode, pages_tpu
from tests.support.kernels import assert_part, bury, lower_for, normal, races_found, slow_rows

SCALE = 0.2
# dtype, K, lists of a head, R, S, Dh, page size, lengths, pages of a list, whether rows start late, splits
CASES = {
    "one row": ("float32", 2, 1, 1, 150, 64, 16, (0, 1, 77, 150), 5, False, None),
    "a list for each of three heads": ("float32", 1, 3, 6, 300, 128, 32, (300, 33), 4, False, 2),
    "six rows, late starts": ("bfloat16", 2, 1, 6, 200, 64, 16, (200, 47, 0), 13, True, None),
    "a list for each of seven heads": ("bfloat16", 1, 7, 7, 140, 256, 64, (129,), 3, False, 3),
    "more pages than a step takes": ("float32", 1, 1, 3, 330, 64, 16, (321, 17), 21, True, 2),
}


def operands(name, seed=0):
    dtype, heads, lists, rows, slots, head_dim, page, lengths, count, late, splits = CASES[name]
    rng, batch = np.random.default_rng(seed), len(lengths)
    lengths = jnp.asarray(lengths, jnp.int32)
    q = normal(rng, dtype, batch, heads, rows, head_dim)
    k, v = (bury(normal(rng, dtype, batch, heads, slots, head_dim), lengths) for _ in "kv")
    pages = np.full((batch, heads * lists, count), -1, np.int32)
    for b, j in np.ndindex(pages.shape[:2]):
        chosen = rng.permutation(-(-slots // page))[: rng.integers(0, count + 1) if b + j else count]
        pages[b, j, rng.permutation(count)[: len(chosen)]] = chosen
    last = np.asarray(lengths)[:, None] // 2 + 3
    first = jnp.asarray(rng.integers(-5, last, (batch, rows)), jnp.int32) if late else None
    return (q, k, v, lengths), {
        "pages": jnp.asarray(pages),
        "page_size": page,
        "first": first,
        "scale": SCALE,
        "splits": splits,
    }


def expected(args, options):
    q, k, _, _ = args
    (batch, heads, rows, _), slots, pages = q.shape, k.shape[2], np.asarray(options["pages"])
    lists = pages.shape[1] // heads
    listed = (pages[:, :, :, None] == np.arange(slots) // options["page_size"]).any(axis=2)
    listed = np.repeat(listed.reshape(batch, heads, lists, slots), rows // lists, axis=2)
    first = np.zeros((batch, rows), np.int32) if options["first"] is None else options["first"]
    return slow_rows(*args, first, SCALE, None, listed)


def check(part, args, options):
    out, lse = expected(args, options)
    assert_part(part, out, lse, args[0].dtype)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    args, options = operands(name)
    check(jax.jit(lambda *a: flash_decode(*a, **options, impl="xla"))(*args), args, options)


@pytest.mark.parametrize("name", CASES)
def test_kernel(name, form):
    args, options = operands(name)
    check(flash_decode(*args, **options, **form), args, options)


@pytest.mark.parametrize("name", ["more pages than a step takes"])
def test_kernel_in_simulated_memory(name):
    args, options = operands(name)
    check(flash_decode(*args, **options, impl="pallas", interpret=compat.tpu_interpreter()), args, options)
    assert not races_found()


def test_all_pages_are_all_slots(form):
    args, options = operands("more pages than a step takes")
    pages = jnp.broadcast_to(jnp.arange(21, dtype=jnp.int32)[::-1], (2, 1, 21))
    paged = flash_decode(*args, **options | {"pages": pages}, **form)
    whole = flash_decode(*args, **options | {"pages": None, "page_size": None})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), paged, whole)


def test_lists_of_some_heads(form):
    (q, k, v, lengths), options = operands("one row")
    options |= {"pages": options["pages"][:, :1]}
    for last in (0, 1):
        part = flash_decode(q[:, last:][:, :1], k, v, lengths, heads=(last,), **options, **form)
        heads = slice(last, last + 1)
        alone = flash_decode(q[:, heads], k[:, heads], v[:, heads], lengths, **options)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), part, alone)


def test_other_pages_are_not_read(form):
    """What stands in them may be NaN."""
    (q, k, v, lengths), options = operands("one row")
    wanted = (np.asarray(options["pages"])[:, :, :, None] == np.arange(150) // 16).any(axis=2)[..., None]
    expected = flash_decode(q, k, v, lengths, **options, **form)
    got = flash_decode(q, *(jnp.where(wanted, x, np.nan) for x in (k, v)), lengths, **options, **form)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_planted_bug_is_caught(monkeypatch):
    """Slots counted from the place of a page in its list, not from its number."""
    absorb = pages_tpu.absorb_slots
    monkeypatch.setattr(pages_tpu, "absorb_slots", lambda begin, *rest, **options: absorb(0 * begin, *rest, **options))
    args, options = operands("more pages than a step takes")
    part = flash_decode(*args, **options, impl="pallas", interpret=True)
    with pytest.raises(AssertionError, match="Not equal|Mismatched"):
        check(part, args, options)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize(("rows", "lists", "head_dim", "page"), [(1, 1, 64, 16), (42, 6, 128, 64), (7, 7, 256, 128)])
def test_lowering(platform, dtype, rows, lists, head_dim, page, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: {"cuda": "gpu"}.get(platform, platform))
    shapes = [jax.ShapeDtypeStruct((4, 2, n, head_dim), dtype) for n in (rows, 1000, 1000)]
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (4, rows), (4, 2 * lists, 9))]

    def run(q, k, v, lengths, first, pages):
        return flash_decode(q, k, v, lengths, first=first, pages=pages, page_size=page, impl="pallas")

    lower_for(platform, run, *shapes, *integers)


def integers(*shape, fill=0):
    return jnp.full(shape, fill, jnp.int32)


BAD = {
    "pages without a size": ({"page_size": None}, "page_size is None and pages is given"),
    "a size without pages": ({"pages": None}, "page_size is 16 and pages is None"),
    "no size": ({"page_size": 0}, "page_size is 0; it must be at least 1"),
    "heads without pages": ({"page_size": None, "pages": None, "heads": (0, 1)}, "neither of them nor heads"),
    "heads that are not there": (
        {"heads": (0, 2)},
        r"heads is \[0, 2\]; it must name one of the 2 heads of k for each",
    ),
    "too few heads": ({"heads": (1,)}, "for each of the 2 of q_rows"),
    "rank": ({"pages": integers(2, 2)}, r"pages has the shape \(2, 2\); it must be \[B, J, X\]"),
    "no page": ({"pages": integers(2, 2, 0)}, "X above 0"),
    "lists": ({"pages": integers(2, 3, 4)}, r"pages has 3 lists; there must be K \(2\)"),
    "lists that rows cannot share": ({"pages": integers(2, 8, 4)}, "divides the 6 rows"),
    "floats": ({"pages": jnp.zeros((2, 2, 4))}, "pages has the dtype float32; it must be int32"),
    "beyond": (
        {"pages": integers(2, 2, 4, fill=13)},
        "pages holds 13; every number must be below the cache's 13 pages",
    ),
    "no kernel for the size": (
        {"page_size": 48, "impl": "pallas", "interpret": True},
        "no kernel for pages of 48 slots .it must be one of 16, 32, 64, 128",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    bad, message = BAD[name]
    q, k = jnp.zeros((2, 2, 6, 64)), jnp.zeros((2, 2, 200, 64))
    with pytest.raises(ValueError, match=message):
        flash_decode(q, k, k, integers(2), **{"pages": integers(2, 2, 4), "page_size": 16} | bad)
