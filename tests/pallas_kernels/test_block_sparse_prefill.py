"""Block-sparse prefill: every form against slow float64 loops, over dead slots full of garbage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, dispatch
from pallas_kernels.block_sparse_prefill import HeadBlocks, block_sparse_prefill, gpu, tpu
from tests.support.kernels import TOLERANCES, bury, lower_for, normal, races_found

SCALE = 0.2
# dtype, G, T, S, Dh, block, lengths, heads, softcap
CASES = {
    "dense and streaming": ("float32", 1, 200, 210, 64, 64, (200, 70), (None, HeadBlocks(1, 1)), None),
    "three heads a group": ("bfloat16", 3, 257, 257, 64, 64, (257, 0, 1), (HeadBlocks(1, 2), None), 3.0),
    "no sink, large blocks": ("float32", 6, 140, 150, 128, 128, (140,), (HeadBlocks(0, 1),), None),
    "wide heads, more blocks than there are": ("bfloat16", 7, 130, 130, 256, 64, (129,), (HeadBlocks(2, 9),), None),
}


def operands(name, seed=0):
    dtype, group, positions, slots, head_dim, _, lengths, heads, _ = CASES[name]
    rng, batch, lengths = np.random.default_rng(seed), len(lengths), jnp.asarray(lengths, jnp.int32)
    q = normal(rng, dtype, batch, positions, group * len(heads), head_dim)
    k, v = (bury(normal(rng, dtype, batch, len(heads), slots, head_dim), lengths) for _ in "kv")
    return q, k, v, lengths


def run(name, args, **options):
    *_, block, _, heads, softcap = CASES[name]
    return block_sparse_prefill(*args, heads, block=block, scale=SCALE, softcap=softcap, **options)


def slow(name, q, k, v, lengths):
    _, group, *_, block, _, heads, softcap = CASES[name]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, h in np.ndindex(len(q), q.shape[2]):
        blocks = heads[h // group]
        for t in range(int(lengths[b])):
            seen = np.arange(t + 1)
            if blocks is not None:
                seen = seen[(seen // block < blocks.sink) | (seen // block > t // block - blocks.local)]
            scores = k[b, h // group, seen] @ q[b, t, h] * SCALE
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, h // group, seen]
    return out


def check(got, name, args):
    assert got.dtype == args[0].dtype
    tolerance = TOLERANCES[str(got.dtype)]
    np.testing.assert_allclose(np.asarray(got, np.float64), slow(name, *args), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    args = operands(name)
    check(jax.jit(lambda *args: run(name, args))(*args), name, args)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_kernel(name, form, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: form)
    args = operands(name)
    check(run(name, args, impl="pallas", interpret=True), name, args)


@pytest.mark.parametrize("name", ["dense and streaming"])
def test_kernel_in_simulated_memory(name):
    args = operands(name)
    check(run(name, args, impl="pallas", interpret=compat.tpu_interpreter()), name, args)
    assert not races_found()


@pytest.mark.parametrize("form", ["tpu", "gpu"])
def test_blocks_that_are_not_listed_are_not_read(form, monkeypatch):
    """What stands in them may be NaN: of a streaming head's four blocks the last query block reads the first and its
    own.
    """
    monkeypatch.setattr(dispatch, "platform", lambda: form)
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, "float32", 1, *shape, 64) for shape in ((256, 1), (1, 256), (1, 256)))
    lengths, options = jnp.asarray([256], jnp.int32), {"block": 64, "impl": "pallas", "interpret": True}
    between = ((jnp.arange(256) >= 64) & (jnp.arange(256) < 192))[None, None, :, None]
    expected = block_sparse_prefill(q, k, v, lengths, [HeadBlocks(1, 1)], **options)
    buried = (jnp.where(between, np.nan, x) for x in (k, v))
    got = block_sparse_prefill(q, *buried, lengths, [HeadBlocks(1, 1)], **options)
    np.testing.assert_array_equal(got[:, 192:], expected[:, 192:])


@pytest.mark.parametrize(("form", "room"), [("tpu", tpu), ("gpu", gpu)])
def test_a_planted_bug_is_caught(form, room, monkeypatch):
    """The blocks behind the sink are not skipped, so that the last ones are never read."""
    monkeypatch.setattr(dispatch, "platform", lambda: form)
    monkeypatch.setattr(room, "listed_block", lambda n, query_block, sink, local: n)
    args = operands("dense and streaming")
    with pytest.raises(AssertionError, match="Not equal"):
        check(run("dense and streaming", args, impl="pallas", interpret=True), "dense and streaming", args)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize(("group", "block", "head_dim"), [(1, 128, 64), (7, 128, 128), (3, 256, 256)])
def test_lowering(platform, dtype, group, block, head_dim, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: {"cuda": "gpu"}.get(platform, platform))
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 1000, 2 * group, head_dim), (2, 2, 1030, head_dim)))

    def prefill(q, k, v, lengths):
        heads = [None, HeadBlocks(1, 2)]
        return block_sparse_prefill(q, k, v, lengths, heads, block=block, softcap=5.0, impl="pallas")

    lower_for(platform, prefill, q, k, k, jax.ShapeDtypeStruct((2,), jnp.int32))


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


KERNEL = {"impl": "pallas", "interpret": True}
BAD = {
    "heads that do not divide": ({"q": zeros(2, 200, 7, 64)}, "q has 7 heads and k has 2; the second must divide"),
    "rank": ({"q": zeros(2, 200, 64)}, "four axes"),
    "too few slots": ({"q": zeros(2, 201, 4, 64)}, "q has 201 positions and k 200 slots"),
    "values": ({"v": zeros(2, 2, 199, 64)}, r"v has the shape \(2, 2, 199, 64\)"),
    "lengths": ({"lengths": jnp.asarray([201, 0], jnp.int32)}, "lengths holds 201"),
    "mixed dtypes": ({"v": zeros(2, 2, 200, 64, dtype="bfloat16")}, "v bfloat16"),
    "lists": ({"heads": [None]}, "heads has 1 entries; it must have one for each of the 2 heads"),
    "no local block": ({"heads": [None, HeadBlocks(3, 0)]}, r"heads\[1\] is HeadBlocks\(sink=3, local=0\)"),
    "block": ({"block": 0}, "block is 0; it must be at least 1"),
    "block without a kernel": ({"block": 96, **KERNEL}, "no kernel for blocks of 96 positions"),
    "block beyond the cache": ({"block": 256, **KERNEL}, "no kernel for 200 slots .it needs a whole block of 256"),
    "too many rows": ({"q": zeros(2, 200, 18, 64), **KERNEL}, "no kernel for 9 heads of a group in blocks of 128"),
    "impl": ({"impl": "cuda"}, "impl is 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    bad, message = BAD[name]
    good = {"q": zeros(2, 200, 4, 64), "k": zeros(2, 2, 200, 64), "v": zeros(2, 2, 200, 64)}
    good |= {"lengths": zeros(2, dtype="int32"), "heads": [None, HeadBlocks(1, 1)]}
    with pytest.raises(ValueError, match=message):
        block_sparse_prefill(**good | bad)
