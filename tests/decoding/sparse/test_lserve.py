"""LServe against a slow reference, dense decoding, and what its pages promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.autoregressive import DENSE
from decoding.sparse import lserve
from decoding.sparse.gates import retrieval_heads
from decoding.sparse.lserve import LServeOptions, lserve_policy
from models.attention import TreeRows, attention_output, attention_scores, tree_attend, visible_softmax
from models.cache import init_cache
from models.errors import InputError
from models.quantized_cache import quantized
from pallas_kernels.page_select import PageBounds, chosen_pages
from tests.support.decode_reference import texts
from tests.support.sparse_reference import Rule, deep_model, fast_logits, slow_logits

LENGTHS = (1, 30, 13, 48)  # the last one ends with a page
PROMPTS = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in LENGTHS]
NEW = 14
SIZES = {"budget": 12, "page": 4, "logical": 2, "reuse": 2}
GATES = ((0.9, 0.1), (0.8, 0.7), (0.2, 0.3), (0.0, 0.0), (0.6, 0.4))  # layer 3 has a window


class LServeRule(Rule):
    """Streaming heads, and pages by the bound of q . k, chosen anew where the count of earlier tokens says so."""

    def __init__(self, retrieval, options: LServeOptions):
        self.retrieval, self.options, self.memory = retrieval, options, {}

    def choose(self, layer, config, q, keys):
        options, n = self.options, len(keys) - 1
        group = config.num_heads // config.num_kv_heads
        seen = np.zeros((config.num_heads, n + 1), bool)
        for kv in range(config.num_kv_heads):
            heads = range(kv * group, (kv + 1) * group)
            if kv not in self.retrieval[layer]:
                place = np.arange(n + 1)
                seen[heads] = (place < options.sink) | (place > n - options.local)
                continue
            if n % options.reuse == 0 or (layer, kv) not in self.memory:
                self.memory[layer, kv] = self._pages(q[heads], keys[:, kv], n)
            for head, pages in zip(heads, self.memory[layer, kv], strict=True):
                for page in pages:
                    seen[head, page * options.page : (page + 1) * options.page] = True
        return seen

    def _pages(self, q, keys, n) -> list[list[int]]:
        options, newest = self.options, n // self.options.page
        scores = np.full((len(q), newest), -np.inf)
        for head in range(len(q)):
            for page in range(newest):
                for first in range(page * options.page, (page + 1) * options.page, options.logical):
                    part = keys[first : first + options.logical]
                    bound = np.maximum(q[head] * part.max(axis=0), q[head] * part.min(axis=0)).sum()
                    scores[head, page] = max(scores[head, page], bound)
        if options.grouped:
            scores[:] = scores.max(axis=0)
        count = options.budget // options.page - 1
        return [[*np.argsort(-row, kind="stable")[:count], newest] for row in scores]


@pytest.fixture(scope="module")
def deep():
    return deep_model()


@pytest.fixture(scope="module")
def forced() -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 61, (len(PROMPTS), NEW)).tolist()


@pytest.fixture(scope="module")
def dense_logits(deep, forced):
    return fast_logits(*deep, DENSE, PROMPTS, forced)


def run(deep, forced, options: LServeOptions, slots: int = 96) -> np.ndarray:
    return fast_logits(*deep, lserve_policy(deep[0].config, options), PROMPTS, forced, slots)


VARIANTS = {
    "pages": {},
    "grouped, half of the heads streaming": {"grouped": True, "gates": GATES, "sink": 2, "local": 5},
    "chosen at every step": {"reuse": 1, "logical": 4},
    "chosen once per page": {"reuse": 4, "logical": 1, "gates": GATES, "streaming": 0.25, "sink": 0, "local": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_slow_reference_on_a_ragged_batch(deep, forced, dense_logits, variant):
    options = LServeOptions(**{**SIZES, **VARIANTS[variant]})
    fast = run(deep, forced, options, slots=67)  # the last page is cut short
    retrieval = retrieval_heads(deep[0].config, options.gates, options.streaming)
    for row, prompt in enumerate(PROMPTS):
        slow = slow_logits(*deep, LServeRule(retrieval, options), prompt, forced[row])
        np.testing.assert_allclose(fast[row], slow, rtol=1e-3, atol=1e-3)
    assert np.abs(fast - dense_logits).max() > 0.5, "the budget must cost something, or the test says nothing"


@pytest.mark.parametrize("bug", ["stale bounds", "the worst pages"])
def test_the_comparison_sees_planted_bugs(deep, forced, monkeypatch, bug):
    options = LServeOptions(**SIZES)
    if bug == "stale bounds":
        monkeypatch.setattr(lserve, "renewed", lambda bounds, *rest: bounds)
    else:
        monkeypatch.setattr(lserve, "chosen_pages", lambda scores, *rest, **size: chosen_pages(-scores, *rest, **size))
    fast = run(deep, forced, options)
    retrieval = retrieval_heads(deep[0].config, None, 0.5)
    errors = [
        np.abs(fast[row] - slow_logits(*deep, LServeRule(retrieval, options), PROMPTS[row], forced[row])).max()
        for row in (0, 3)
    ]
    assert max(errors) > 0.1


@pytest.mark.parametrize("grouped", [False, True])
def test_with_every_page_chosen_and_no_streaming_heads_it_is_dense(deep, forced, dense_logits, grouped):
    options = LServeOptions(budget=96, page=8, logical=2, grouped=grouped, gates=GATES, streaming=0.0)
    np.testing.assert_allclose(run(deep, forced, options), dense_logits, rtol=1e-5, atol=2e-5)


def test_windows_that_reach_everything_are_dense(deep, forced, dense_logits):
    options = LServeOptions(**SIZES, gates=GATES, streaming=1.0, sink=96, local=1)
    np.testing.assert_allclose(run(deep, forced, options), dense_logits, rtol=1e-5, atol=2e-5)


def test_with_every_page_chosen_it_writes_greedy_text(tiny):
    model, params = tiny
    greedy = make_decode_fn(model, max_new_tokens=24)(params, PROMPTS)
    fn = make_decode_fn(model, "lserve", max_new_tokens=24, budget=96, page=8, logical=4)
    assert texts(fn(params, PROMPTS)) == texts(greedy)


def test_its_text_is_what_the_slow_reference_would_write(deep):
    options = {**SIZES, "gates": [list(layer) for layer in GATES], "sink": 2, "local": 4}
    output = texts(make_decode_fn(deep[0], "lserve", max_new_tokens=NEW, **options)(deep[1], PROMPTS))
    options = LServeOptions(**options)
    for prompt, text in zip(PROMPTS, output, strict=True):
        rule = LServeRule(retrieval_heads(deep[0].config, options.gates, 0.5), options)
        logits = slow_logits(*deep, rule, prompt, text)
        assert (logits[np.arange(NEW), text] > logits.max(axis=1) - 1e-3).all()


READ = {**SIZES, "gates": GATES, "sink": 2, "local": 3}
LONG = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in (58, 5, 33)]


def read_keys(deep, prompt_local: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns f[B, K, S, Dh] of each layer, and the lengths, after prompts were read."""
    fn = make_decode_fn(deep[0], "lserve", max_new_tokens=3, **READ, prompt_local=prompt_local)
    cache = fn.start(deep[1], *fn.inputs(LONG)).cache
    return [np.asarray(k) for k in cache.k], np.asarray(cache.length)


def masked_keys(deep, prompt: list[int], prompt_local: int) -> list[np.ndarray]:
    """Returns f[K, T, Dh] of each layer, from one pass in which streaming heads have a mask."""
    retrieval, place = retrieval_heads(deep[0].config, GATES, 0.5), jnp.arange(len(prompt))
    behind = place[:, None] - place[None, :]

    def attend(q, k, v, cache, ctx, *, config, layer):
        reach = prompt_local if config.window is None else config.window
        near = (behind < reach) | ((place < READ["sink"]) & (config.window is None))[None, :]
        near = (behind >= 0) & near
        dense = [config.window is None and head in retrieval[layer] for head in range(config.num_kv_heads)]
        visible = jnp.stack([behind >= 0 if whole else near for whole in dense])
        weights = visible_softmax(attention_scores(q, jnp.swapaxes(k, 1, 2), config), visible[None, :, None])
        return attention_output(weights, jnp.swapaxes(v, 1, 2)), cache, (*ctx, k[0])

    apply = jax.jit(functools.partial(deep[0].apply, attend=attend, ctx=()))
    return [np.swapaxes(k, 0, 1) for k in apply({"params": deep[1]}, jnp.asarray([prompt], jnp.int32)).aux]


@pytest.mark.parametrize("prompt_local", [1, 7])
def test_streaming_heads_read_prompts_in_their_window(deep, monkeypatch, prompt_local):
    """In chunks of 16 tokens and blocks of 6 it equals the masked definition; a wider window shows."""
    monkeypatch.setattr("decoding.prefill.CHUNK", 16)
    monkeypatch.setattr("decoding.sparse.selected.BLOCK", 6)
    found, lengths = read_keys(deep, prompt_local)
    assert lengths.tolist() == [len(prompt) - 1 for prompt in LONG]
    for row, prompt in enumerate(LONG):
        expected = masked_keys(deep, prompt[:-1], prompt_local)
        for layer, keys in enumerate(expected):
            np.testing.assert_allclose(found[layer][row, :, : len(prompt) - 1], keys, rtol=1e-3, atol=1e-3)
    wider = masked_keys(deep, LONG[0][:-1], prompt_local + 1)[4]
    assert np.abs(found[4][0, :, : len(LONG[0]) - 1] - wider).max() > 0.05


def test_prompts_inside_the_window_are_read_densely(deep, monkeypatch):
    monkeypatch.setattr("decoding.sparse.selected.BLOCK", 10)
    found = read_keys(deep, 64)[0]
    dense = make_decode_fn(deep[0], "sample", max_new_tokens=3)
    expected = dense.start(deep[1], *dense.inputs(LONG)).cache.k
    for layer in range(5):
        np.testing.assert_allclose(found[layer][0, :, :57], np.asarray(expected[layer])[0, :, :57], atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_read_and_pages_chosen_by_the_keys_themselves(deep, bits):
    """The same queries, keys and values for many steps: the same pages as without codes, their values from codes."""
    config = deep[0].config.blocks[0].attention
    sizes = {"budget": 12, "page": 4, "logical": 2, "reuse": 2, "gates": GATES, "sink": 2, "local": 3}
    rng, start = np.random.default_rng(7), jnp.array([5, 18])
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    empty = init_cache([config] * 5, 2, 40, jnp.float32)
    stored = jax.tree.map(lambda x: normal(*x.shape) if x.ndim == 4 else start, empty)
    steps = [(normal(2, 1, 4, 8), normal(2, 1, 2, 8), normal(2, 1, 2, 8)) for _ in range(14)]

    def run(kv_bits, steps, change=lambda x: x):
        policy = lserve_policy(deep[0].config, LServeOptions(**sizes, kv_bits=kv_bits))
        rows = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32), policy.init(stored))
        cache, outs, pages = jax.tree.map(change, policy.keep(stored)).layer(0), [], []
        attend = jax.jit(functools.partial(policy.attend, config=config, layer=0))
        for q, k, v in steps:
            out, cache, rows = attend(q, k, v, cache, rows)
            cache = cache.replace(length=cache.length + 1)
            outs.append(np.asarray(out))
            pages.append(np.asarray(rows.memory[0].pages))
        return np.stack(outs), np.stack(pages)

    rounded = lambda x: quantized(x, bits).values()  # noqa: E731
    plain, pages = run(None, steps)
    coded, chosen = run(bits, steps)
    np.testing.assert_array_equal(chosen, pages)
    assert 0.3 * 2.0**-bits < np.abs(coded - plain).max() < 10 * 2.0**-bits
    # What is read are the codes' values: a cache of these values gives the same wherever it gives the same pages.
    other, others = run(None, [(q, rounded(k), rounded(v)) for q, k, v in steps],
                        lambda x: rounded(x) if x.ndim == 4 else x)  # fmt: skip
    same = (others == pages).all(axis=(1, 2, 3))
    assert same.any()
    np.testing.assert_allclose(other[same], coded[same], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_decoding_with_codes(tiny, bits):
    """A ragged batch through the whole loop: a row does not depend on the others, and many bits change few tokens."""
    options = {"budget": 96, "page": 8, "logical": 4, "kv_bits": bits}
    fn = make_decode_fn(tiny[0], "lserve", max_new_tokens=12, **options)
    together = texts(fn(tiny[1], PROMPTS))
    assert texts(fn(tiny[1], PROMPTS[1:2])) == together[1:2]
    state = fn.start(tiny[1], *fn.inputs(PROMPTS))
    assert {x.bits for x in (*state.cache.k, *state.cache.v)} == {bits}
    if bits == 8:
        greedy = texts(make_decode_fn(tiny[0], max_new_tokens=12)(tiny[1], PROMPTS))
        assert [text[0] for text in together] == [text[0] for text in greedy]


def test_rows_of_a_tree_share_the_choice_of_its_root(deep):
    """A chain read at once, with every page chosen, equals tree attention; the choice is kept for the next step."""
    config = deep[0].config.blocks[0].attention
    options = LServeOptions(budget=64, page=8, logical=2)
    policy = lserve_policy(deep[0].config, options)
    rng = np.random.default_rng(6)
    rows = TreeRows(jnp.asarray(np.tril(np.ones((1, 3, 3))), bool), jnp.array([[0, 1, 2]]))
    stored = init_cache([config] * 5, 1, 40, jnp.float32)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    stored = jax.tree.map(lambda x: normal(*x.shape) if x.ndim == 4 else jnp.array([21]), stored)
    q, k, v = (normal(1, 3, heads, 8) for heads in (4, 2, 2))
    rows = rows.replace(memory=policy.init(stored))
    out, _, ctx = policy.attend(q, k, v, stored.layer(0), rows, config=config, layer=0)
    dense = tree_attend(q, k, v, stored.layer(0), rows, config=config, layer=0)[0]
    np.testing.assert_allclose(out, dense, atol=1e-5)
    assert ctx.memory[0].chosen_at.tolist() == [21] and set(ctx.memory[0].pages[0, 0].tolist()) == {0, 1, 2, -1}
    assert isinstance(ctx.memory[0].bounds, PageBounds) and ctx.memory[1].chosen_at.tolist() == [-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page": 0}, "page must be at least 1 token, got 0"),
        ({"logical": 24}, r"logical must divide page \(64 tokens\), got 24"),
        ({"reuse": 5}, r"reuse must divide page \(64 tokens\), got 5"),
        ({"reuse": 0}, "reuse must divide page"),
        ({"budget": 200}, r"budget must be a multiple of page \(64 tokens\), 192 at least; got 200"),
        ({"budget": 128}, "192 at least; got 128"),
        ({"streaming": 1.5}, "streaming must be a share of the heads, 0 to 1; got 1.5"),
        ({"gates": [[1.0, 0.5]]}, "gates must have one number per layer and key/value head: 5 layers of 2"),
        ({"local": 0}, "local 1 or more"),
        ({"local": 64, "streaming": 0.25}, "streaming, local say how heads stream, and without gates none does"),
        ({"prompt_local": 0}, "prompt_local 1 or more"),
        ({"kv_bits": 3}, "kv_bits must be 4 or 8, or None"),
        ({"kv_bits": 8, "drafted": 2}, "leave out drafted, or kv_bits"),
    ],
)
def test_wrong_options_are_refused(deep, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(deep[0], "lserve", **options)


def made_in(jaxpr):
    """Yields the shape of every array that a jaxpr makes, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from made_in(inner)


def test_pages_cost_the_same_at_any_context_length(deep):
    """Nothing but bounds and their scores grows with the cache: no array has a side for all slots beside the cache."""
    options = LServeOptions(budget=12, page=4, logical=4, reuse=4)
    policy = lserve_policy(deep[0].config, options)
    config = deep[0].config.blocks[0].attention

    def shapes(slots: int) -> list[tuple[int, ...]]:
        cache = init_cache([config] * 5, 1, slots, jnp.float32)
        rows = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32), policy.init(cache))
        q, k = jnp.zeros((1, 1, 4, 8)), jnp.zeros((1, 1, 2, 8))
        one = functools.partial(policy.attend, config=config, layer=0)
        jaxpr = jax.make_jaxpr(one)(q, k, k, cache.layer(0), rows).jaxpr
        return list(made_in(jaxpr))

    def read(slots: int) -> list[tuple[int, ...]]:
        cache = init_cache([config] * 5, 1, slots, jnp.float32)
        q, k = jnp.zeros((1, 16, 4, 8)), jnp.zeros((1, 16, 2, 8))
        streaming = dataclasses.replace(options, gates=GATES, streaming=1.0, prompt_local=20)
        one = functools.partial(lserve_policy(deep[0].config, streaming).read, config=config, layer=0)
        return list(made_in(jax.make_jaxpr(lambda *args: one(*args, None))(q, k, k, cache.layer(0)).jaxpr))

    cache_like = {((1, 2, 400, 8), (1, 2, 800, 8)), ((2, 400, 8), (2, 800, 8)), ((800, 8), (1600, 8))}
    assert {(one, two) for one, two in zip(read(400), read(800), strict=True) if one != two} <= cache_like
    grown = {(one, two) for one, two in zip(shapes(400), shapes(800), strict=True) if one != two}
    assert grown & cache_like
    assert all(np.prod(two) <= 2 * 200 * 8 for one, two in grown - cache_like), grown
