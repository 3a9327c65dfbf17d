"""Pages by their keys' bounds: every form against slow float64 loops, and against the keys themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.flash_decode.partials import HIDDEN
from pallas_kernels.page_select import PageBounds, chosen_pages, page_bounds, page_scores, tpu
from tests.support.kernels import bury, lower_for, normal, races_found

# dtype, K, R, S, Dh, page, logical, lengths
CASES = {
    "one row": ("float32", 2, 1, 150, 64, 32, 8, (0, 1, 77, 150)),
    "no logical pages": ("bfloat16", 1, 3, 130, 128, 16, 16, (130, 17)),
    "seven heads, many pages": ("float32", 1, 7, 2100, 64, 16, 8, (2100, 1024)),
    "two blocks of rows": ("bfloat16", 1, 65, 256, 256, 64, 16, (200,)),
}


def operands(name, seed=0):
    """Returns q [B, K, R, Dh], keys [B, K, S, Dh] with garbage in dead slots, lengths, and the two sizes."""
    dtype, heads, rows, slots, head_dim, page, logical, lengths = CASES[name]
    rng, batch, lengths = np.random.default_rng(seed), len(lengths), jnp.asarray(lengths, jnp.int32)
    q = normal(rng, dtype, batch, heads, rows, head_dim)
    k = bury(normal(rng, dtype, batch, heads, slots, head_dim), lengths)
    return q, k, lengths, {"page_size": page, "logical_size": logical}


def slow_scores(q, k, lengths, page_size, logical_size):
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    out = np.full((*q.shape[:3], -(-k.shape[2] // page_size)), HIDDEN)
    for b, h, r in np.ndindex(q.shape[:3]):
        for begin in range(0, int(lengths[b]), logical_size):
            keys = k[b, h, begin : min(begin + logical_size, int(lengths[b]))]
            bound = np.maximum(q[b, h, r] * keys.max(0), q[b, h, r] * keys.min(0)).sum()
            out[b, h, r, begin // page_size] = max(out[b, h, r, begin // page_size], bound)
    return out


def check(scores, args):
    q, k, lengths, sizes = args
    expected = slow_scores(q, k, lengths, **sizes)
    assert scores.dtype == jnp.float32 and scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-4)  # products are exact; sums of up to 256 of them


def run(args, **options):
    q, k, lengths, sizes = args
    return page_scores(q, page_bounds(k, lengths, **sizes), lengths, **sizes, **options)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    args = operands(name)
    check(jax.jit(lambda q, k, lengths: run((q, k, lengths, args[3])))(*args[:3]), args)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_kernel(name, form, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: form)
    args = operands(name)
    check(run(args, impl="pallas", interpret=True), args)


@pytest.mark.parametrize("name", ["seven heads, many pages"])
def test_kernel_in_simulated_memory(name):
    args = operands(name)
    check(run(args, impl="pallas", interpret=compat.tpu_interpreter()), args)
    assert not races_found()


def test_scores_bound_all_products():
    q, k, lengths, sizes = operands("one row")
    scores = np.asarray(run((q, k, lengths, sizes)))
    products = np.einsum("bkrd,bksd->bkrs", np.asarray(q), np.asarray(k))
    for b, slot in np.ndindex(len(lengths), k.shape[2]):
        if slot < lengths[b]:
            assert (products[b, :, :, slot] <= scores[b, :, :, slot // sizes["page_size"]] + 1e-5).all()


def test_logical_pages_tighten_the_bound():
    q, k, lengths, sizes = operands("one row")
    fine = np.asarray(run((q, k, lengths, sizes)))
    coarse = np.asarray(run((q, k, lengths, sizes | {"logical_size": sizes["page_size"]})))
    single = np.asarray(run((q, k, lengths, sizes | {"logical_size": 1})))
    assert (single <= fine + 1e-5).all() and (fine <= coarse + 1e-5).all() and (fine < coarse - 0.1).any()


def test_a_planted_bug_is_caught(monkeypatch):
    """Dead logical pages, whose bounds are zeros, take part."""
    monkeypatch.setattr(tpu, "HIDDEN", 0.0)
    args = operands("one row")
    with pytest.raises(AssertionError, match="Not equal"):
        check(run(args, impl="pallas", interpret=True), args)


def test_the_best_pages_and_the_newest_are_chosen():
    scores = jnp.asarray([[[1.0, 5.0, 3.0, 9.0, 9.0]]])
    for length, expected in {0: [-1, -1, -1], 1: [-1, -1, 0], 17: [0, -1, 1], 64: [1, 2, 3], 65: [3, 1, 4]}.items():
        chosen = chosen_pages(scores, jnp.asarray([length], jnp.int32), 3, page_size=16)
        np.testing.assert_array_equal(chosen, [[expected]], err_msg=str(length))
    assert chosen_pages(scores, jnp.asarray([80], jnp.int32), 99, page_size=16).shape == (1, 1, 5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize(("rows", "pages", "logical", "head_dim"), [(1, 9, 1, 64), (7, 300, 4, 128), (65, 40, 8, 256)])
def test_lowering(platform, dtype, rows, pages, logical, head_dim, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: {"cuda": "gpu"}.get(platform, platform))
    q, bounds = (jax.ShapeDtypeStruct((2, 2, n, head_dim), dtype) for n in (rows, pages * logical))

    def scores(q, high, low, lengths):
        sizes = {"page_size": 16 * logical, "logical_size": 16}
        return page_scores(q, PageBounds(high, low), lengths, **sizes, impl="pallas")

    lower_for(platform, scores, q, bounds, bounds, jax.ShapeDtypeStruct((2,), jnp.int32))


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


BAD = {
    "sizes": ({"logical_size": 12}, "logical_size is 12 and page_size 32; the first must divide the second"),
    "rank": ({"q_rows": zeros(2, 2, 64)}, r"q_rows has the shape \(2, 2, 64\)"),
    "heads": ({"q_rows": zeros(2, 3, 5, 64)}, r"bounds.high has the shape \(2, 2, 24, 64\).*must be \(2, 3, 24, 64\)"),
    "low": ({"low": zeros(2, 2, 23, 64)}, r"bounds.low has the shape \(2, 2, 23, 64\)"),
    "count": ({"logical_size": 4, "page_size": 20}, "24 logical pages; with 5 to a page"),
    "dtypes": ({"q_rows": zeros(2, 2, 5, 64, dtype="bfloat16")}, "q_rows bfloat16, high float32"),
    "lengths": ({"lengths": jnp.asarray([193, 0], jnp.int32)}, "lengths holds 193"),
    "lengths per row": ({"lengths": zeros(3, dtype="int32")}, r"lengths has the shape \(3,\)"),
    "too many logical pages": (
        {"page_size": 96, "impl": "pallas", "interpret": True},
        "no kernel for 12 logical pages to a page .at most 8",
    ),
    "impl": ({"impl": "cuda"}, "impl is 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    values = {"q_rows": zeros(2, 2, 5, 64), "high": zeros(2, 2, 24, 64), "low": zeros(2, 2, 24, 64)}
    values |= {"lengths": zeros(2, dtype="int32"), "page_size": 32, "logical_size": 8} | BAD[name][0]
    bounds = PageBounds(values.pop("high"), values.pop("low"))
    with pytest.raises(ValueError, match=BAD[name][1]):
        page_scores(bounds=bounds, **values)


def test_bad_input_of_the_other_steps():
    lengths, sizes = zeros(2, dtype="int32"), {"page_size": 32, "logical_size": 8}
    with pytest.raises(ValueError, match="four axes"):
        page_bounds(zeros(2, 50, 64), lengths, **sizes)
    with pytest.raises(ValueError, match="lengths holds 51"):
        page_bounds(zeros(2, 1, 50, 64), lengths + 51, **sizes)
    with pytest.raises(ValueError, match="count is 0"):
        chosen_pages(zeros(2, 1, 5), lengths, 0, page_size=32)
    with pytest.raises(ValueError, match="three axes"):
        chosen_pages(zeros(2, 5), lengths, 2, page_size=32)
