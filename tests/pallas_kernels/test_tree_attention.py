"""Tree attention against the model's own, and against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.attention
from models.attention import TreeRows, tree_attend
from models.cache import LayerCache
from models.config import AttentionConfig
from pallas_kernels import compat, dispatch
from pallas_kernels import tree_attention as room
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.tree_attention.reference import tree_attention_reference
from tests.support.kernels import TOLERANCES, bury, lower_for, normal, races_found

# dtype, config, W, T, S, lengths
CASES = {
    "chain of one": ("float32", AttentionConfig(2, 2, 64), 1, 1, 130, (0, 1, 129)),
    "three heads a group": ("bfloat16", AttentionConfig(9, 3, 64), 13, 13, 150, (0, 77, 137)),
    "window, one level": ("float32", AttentionConfig(6, 1, 128, window=9), 8, 3, 300, (0, 4, 290)),
    "64 nodes": ("float32", AttentionConfig(7, 1, 64, window=40, softcap=2.0), 64, 64, 200, (136, 30)),
    "wide heads": ("bfloat16", AttentionConfig(3, 1, 256, scale=0.2), 8, 8, 200, (1, 192)),
}


def random_tree(rng, batch, width):
    """Returns ancestors bool[B, W, W] and depth i32[B, W] of trees whose nodes follow their parents."""
    ancestors = np.zeros((batch, width, width), bool)
    for b, node in np.ndindex(batch, width):
        if node:
            ancestors[b, node] = ancestors[b, rng.integers(max(0, node - 3), node)]
        ancestors[b, node, node] = True
    return ancestors, ancestors.sum(-1, dtype=np.int32) - 1


def operands(name, seed=0):
    """Returns q [B, T, H, Dh], the cache's k and v, the tree's k and v, lengths, ancestors [B, T, W], depth [B, W]."""
    dtype, config, width, num_new, slots, lengths = CASES[name]
    rng, batch, lengths = np.random.default_rng(seed), len(lengths), jnp.asarray(lengths, jnp.int32)
    ancestors, depth = random_tree(rng, batch, width)
    q = normal(rng, dtype, batch, num_new, config.num_heads, config.head_dim)
    cached = [bury(normal(rng, dtype, batch, config.num_kv_heads, slots, config.head_dim), lengths) for _ in "kv"]
    tree = [normal(rng, dtype, batch, config.num_kv_heads, width, config.head_dim) for _ in "kv"]
    return q, *cached, *tree, lengths, jnp.asarray(ancestors[:, width - num_new :]), jnp.asarray(depth)


def of_model(name, q, k, v, tree_k, tree_v, lengths, ancestors, depth):
    """The model's attention, with the earlier rows of the tree where earlier passes would have left them."""
    _, config, width, num_new, *_ = CASES[name]
    write = jax.vmap(lambda slots, rows, start: jax.lax.dynamic_update_slice(slots, rows, (0, start, 0)))
    old, new = slice(width - num_new), slice(width - num_new, None)
    cache = LayerCache(write(k, tree_k[:, :, old], lengths), write(v, tree_v[:, :, old], lengths), lengths)
    new_k, new_v = (jnp.swapaxes(x[:, :, new], 1, 2) for x in (tree_k, tree_v))
    return tree_attend(q, new_k, new_v, cache, TreeRows(ancestors, depth), config=config, layer=0)[0]


def run(name, args, **options):
    config = CASES[name][1]
    *args, depth = args
    options |= {"window": config.window, "scale": config.scale, "softcap": config.softcap, "depth": depth}
    return tree_attention(*args, **options)


def close(got, expected, dtype):
    assert str(got.dtype) == dtype
    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["xla", "tpu", "gpu"])
def test_equals_the_models_attention(name, form, monkeypatch):
    args = operands(name)
    expected = jax.jit(lambda *args: of_model(name, *args))(*args)
    if form == "xla":
        got = jax.jit(lambda *args: run(name, args))(*args)
    else:
        monkeypatch.setattr(dispatch, "platform", lambda: form)
        got = run(name, args, impl="pallas", interpret=True, splits=2)
    close(got, expected, CASES[name][0])


def test_equals_the_models_attention_in_simulated_memory():
    name = "window, one level"
    args = operands(name)
    got = run(name, args, impl="pallas", interpret=compat.tpu_interpreter())
    close(got, of_model(name, *args), "float32")
    assert not races_found()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    *args, depth = operands(name)
    dtype, config, *_ = CASES[name]
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    options = {"window": config.window, "scale": scale, "softcap": config.softcap, "depth": depth}
    close(tree_attention(*args, **options), tree_attention_reference(*args, **options), dtype)


def test_a_node_does_not_see_what_is_not_above_it():
    args = list(operands("three heads a group"))
    before = run("three heads a group", args)
    node = 12
    others = ~np.asarray(args[6][:, node])
    for i in (3, 4):
        args[i] = jnp.where(others[:, None, :, None], jnp.asarray(50.0, args[i].dtype), args[i])
    after = run("three heads a group", args)
    np.testing.assert_array_equal(*(np.asarray(x[:, node], np.float32) for x in (before, after)))
    assert not np.array_equal(*(np.asarray(x, np.float32) for x in (before, after)))


def test_one_tree_serves_the_whole_batch():
    *args, ancestors, depth = operands("window, one level")
    one = [*args, ancestors[:1], depth[:1]]
    each = [*args, jnp.tile(ancestors[:1], (3, 1, 1)), jnp.tile(depth[:1], (3, 1))]
    np.testing.assert_allclose(run("window, one level", one), run("window, one level", each), atol=1e-6)


def test_padding_over_an_empty_cache_is_zero():
    args = list(operands("three heads a group"))
    args[6] = args[6].at[:, 5].set(False)
    got = np.asarray(run("three heads a group", args), np.float32)
    assert not got[0, 5].any() and got[1, 5].any() and np.isfinite(got).all()


@pytest.mark.parametrize("name", ["window, one level", "64 nodes"])
def test_a_planted_bug_is_caught(name, monkeypatch):
    """Rows folded as t*G + g, while the mask is tiled as g*T + t."""
    true_part = room._tree_part

    def folded_wrongly(rows, *args, **options):
        rows = jnp.swapaxes(rows.reshape(*rows.shape[:2], -1, args[2].shape[1], rows.shape[3]), 2, 3)
        return true_part(rows.reshape(*rows.shape[:2], -1, rows.shape[4]), *args, **options)

    monkeypatch.setattr(room, "_tree_part", folded_wrongly)
    args = operands(name)
    with pytest.raises(AssertionError, match="Not equal"):
        close(run(name, args), of_model(name, *args), "float32")


def test_no_mask_over_all_slots():
    """No value of the program has an axis of S + W, as the reference's mask has."""
    slots, width = 1009, 13
    _, config, *_ = CASES["three heads a group"]
    k = jax.ShapeDtypeStruct((1, 3, slots, 64), jnp.float32)
    tree = jax.ShapeDtypeStruct((1, 3, width, 64), jnp.float32)
    q = jax.ShapeDtypeStruct((1, width, 9, 64), jnp.float32)
    lengths, ancestors = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, width, width), jnp.bool_)
    text = str(jax.make_jaxpr(tree_attention)(q, k, k, tree, tree, lengths, ancestors))
    assert str(slots) in text and str(slots + width) not in text
    reference = lambda *args: tree_attention_reference(  # noqa: E731
        *args, depth=jnp.zeros((1, width), jnp.int32), window=None, scale=1.0, softcap=None
    )
    assert str(slots + width) in str(jax.make_jaxpr(reference)(q, k, k, tree, tree, lengths, ancestors))


@pytest.mark.parametrize("lists", [1, 3])
def test_listed_pages_of_some_heads(lists):
    """A list for each key/value head, or for each query head; what stands in other pages does not count."""
    q, k, v, tree_k, tree_v, lengths, ancestors, depth = operands("three heads a group")
    heads, queries = [2, 0], [*range(6, 9), *range(3)]
    pages = jnp.broadcast_to(jnp.array([6, -1, 1, 0], jnp.int32), (3, 2 * lists, 4))
    args = q[:, :, queries], tree_k[:, heads], tree_v[:, heads], lengths, ancestors
    got = tree_attention(args[0], k, v, *args[1:], pages=pages, page_size=16, heads=heads)
    slots = jnp.asarray([slot for slot in range(150) if slot // 16 in (0, 1, 6)])
    live = (slots[None, :] < lengths[:, None]).sum(axis=1, dtype=jnp.int32)
    few = [x[:, heads][:, :, slots] for x in (k, v)]
    expected = tree_attention(args[0], *few, *args[1:3], live, ancestors)
    close(got, expected, "bfloat16")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_lowering(platform, name, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: {"cuda": "gpu"}.get(platform, platform))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(name)]
    lower_for(platform, lambda *args: run(name, args, impl="pallas"), *shapes)


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


BAD = {
    "heads that do not divide": ({"q": zeros(2, 5, 7, 64)}, "q has 7 heads and k has 2; the second must divide"),
    "too wide": (
        {"tree_k": zeros(2, 2, 257, 64), "tree_v": zeros(2, 2, 257, 64)},
        "the tree has 257 rows; it may have at most 256",
    ),
    "more new rows than rows": ({"q": zeros(2, 6, 4, 64)}, "q has 6 rows and the tree 5"),
    "rank": ({"q": zeros(2, 5, 64)}, "four axes"),
    "head width": ({"k": zeros(2, 2, 200, 32)}, r"k has the shape \(2, 2, 200, 32\).*must be \(2, 2, 200, 64\)"),
    "tree keys": ({"tree_k": zeros(2, 1, 5, 64)}, r"tree_k has the shape"),
    "tree values": ({"tree_v": zeros(2, 2, 4, 64)}, r"tree_v has the shape"),
    "ancestors": ({"ancestors": zeros(2, 5, 4, dtype=bool)}, r"ancestors has the shape \(2, 5, 4\)"),
    "ancestors of three": ({"ancestors": zeros(3, 5, 5, dtype=bool)}, r"must be \(2, 5, 5\)"),
    "ancestors as numbers": ({"ancestors": zeros(2, 5, 5)}, "ancestors has the dtype float32; it must be bool"),
    "window": ({"window": 0}, "window is 0; it must be at least 1"),
    "window without depth": ({"window": 3}, "window is 3 and depth is None"),
    "depth": ({"window": 3, "depth": zeros(2, 4, dtype="int32")}, r"depth has the shape \(2, 4\)"),
    "float depth": ({"window": 3, "depth": zeros(2, 5)}, "depth has the dtype float32"),
    "mixed dtypes": ({"tree_v": zeros(2, 2, 5, 64, dtype="bfloat16")}, "tree_v bfloat16"),
    "lengths": ({"lengths": jnp.asarray([201, 0], jnp.int32)}, "lengths holds 201"),
    "lengths per row": ({"lengths": zeros(3, dtype="int32"), "window": 3}, r"lengths has the shape \(3,\)"),
    "impl": ({"impl": "cuda"}, "impl is 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    bad, message = BAD[name]
    good = {"q": zeros(2, 5, 4, 64), "k": zeros(2, 2, 200, 64), "v": zeros(2, 2, 200, 64)}
    good |= {"tree_k": zeros(2, 2, 5, 64), "tree_v": zeros(2, 2, 5, 64), "lengths": zeros(2, dtype="int32")}
    with pytest.raises(ValueError, match=message):
        tree_attention(**good | {"ancestors": zeros(2, 5, 5, dtype=bool)} | bad)


@pytest.mark.parametrize("name", ["window, one level", "three heads a group"])
def test_the_model_takes_the_kernel_where_it_was_measured_to_be_faster(name, monkeypatch):
    args = operands(name)
    expected = of_model(name, *args)
    calls = []

    def interpreted(*args, **options):
        calls.append(options["impl"])
        return tree_attention(*args, interpret=True, **options)

    monkeypatch.setattr(models.attention, "tree_attention", interpreted)
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    np.testing.assert_array_equal(of_model(name, *args), expected)
    assert not calls, "nothing was measured"
    monkeypatch.setitem(dispatch.PALLAS_FROM, ("tree_attention", "gpu"), CASES[name][4])
    close(of_model(name, *args), expected, CASES[name][0])
    assert calls == ["pallas"]


@pytest.mark.parametrize("window", [None, 9])
def test_a_step_of_one_token_takes_the_kernel_too(window, monkeypatch):
    config, rng = AttentionConfig(6, 2, 64, window=window), np.random.default_rng(0)
    lengths = jnp.asarray([3, 128], jnp.int32)
    q, k, v = (normal(rng, "float32", 2, 1, heads, 64) for heads in (6, 2, 2))
    cache = LayerCache(*(bury(normal(rng, "float32", 2, 2, 130, 64), lengths) for _ in "kv"), lengths)
    expected, after, _ = models.attention.dense_attend(q, k, v, cache, None, config=config, layer=0)
    monkeypatch.setattr(models.attention, "tree_attention", functools.partial(tree_attention, interpret=True))
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    monkeypatch.setitem(dispatch.PALLAS_FROM, ("tree_attention", "tpu"), 128)
    got, same, ctx = models.attention.dense_attend(q, k, v, cache, None, config=config, layer=0)
    close(got, expected, "float32")
    np.testing.assert_array_equal(same.k, after.k)
    assert ctx is None
