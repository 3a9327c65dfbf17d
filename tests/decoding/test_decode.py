"""The jitted loop: limits, counts, halves, compiled code and its sharing, and what the compiled step copies."""

import dataclasses
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoding.decode
from decoding import METHODS, DecodeOutput, WithDraft, make_decode_fn
from decoding.plan import advance, decode, start
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from tests.support.decode_reference import PROMPTS, ROOM, forward, row_seeds, small_law_model, texts

LIMITS = [0, 1, 24, 3, 7, 23, 2, 0]


@pytest.fixture(scope="module")
def greedy(tiny):
    return make_decode_fn(tiny[0], max_new_tokens=ROOM)


@pytest.fixture(scope="module")
def whole(tiny, greedy) -> list[list[int]]:
    return texts(greedy(tiny[1], PROMPTS))


def assert_counts(output, steps) -> None:
    """Every method of one token per step counts like this."""
    for name in ("steps", "emitted", "target_calls"):
        np.testing.assert_array_equal(getattr(output.stats, name), steps, err_msg=name)
    for name in ("drafted", "accepted", "draft_calls"):
        np.testing.assert_array_equal(getattr(output.stats, name), np.zeros(len(PROMPTS)), err_msg=name)
    np.testing.assert_array_equal(output.lengths, steps)


def test_limits_per_row_cut_the_text_and_are_counted(tiny, greedy, whole):
    output = greedy(tiny[1], PROMPTS, max_new_tokens=LIMITS)
    assert texts(output) == [text[:limit] for text, limit in zip(whole, LIMITS, strict=True)]
    assert_counts(output, LIMITS)


def test_one_limit_holds_for_all_rows(tiny, greedy, whole):
    output = greedy(tiny[1], PROMPTS, max_new_tokens=5)
    assert texts(output) == [text[:5] for text in whole] and output.tokens.shape == (len(PROMPTS), ROOM)
    assert_counts(output, [5] * len(PROMPTS))


def test_zero_new_tokens_for_all_rows_take_no_step(tiny, greedy):
    output = greedy(tiny[1], PROMPTS, max_new_tokens=0)
    assert texts(output) == [[]] * len(PROMPTS)
    assert_counts(output, [0] * len(PROMPTS))


def test_rows_end_at_the_end_of_the_models_context(tiny):
    context = 20
    model = Decoder(dataclasses.replace(tiny[0].config, max_length=context))
    for slots in (None, 64):
        call = make_decode_fn(model, max_new_tokens=ROOM, cache_slots=slots).inputs(PROMPTS)[1]
        assert call.limit.tolist() == [min(ROOM, context - len(prompt) + 1) for prompt in PROMPTS]


SMALL_PROMPTS = [[token % 5 for token in prompt] for prompt in PROMPTS]


def test_pieces_of_steps_equal_one_call():
    model, params = small_law_model()
    settings = {"temperature": 1.2, "repetition_penalty": 1.4, "max_new_tokens": LIMITS}
    fn = make_decode_fn(model, "sample", max_new_tokens=ROOM)
    expected = fn(params, SMALL_PROMPTS, row_seeds(), **settings)
    prompts, call = fn.inputs(SMALL_PROMPTS, row_seeds(), **settings)
    state = fn.start(params, prompts, call)
    assert state.lengths.tolist() == [0] * len(PROMPTS)
    for steps in (1, 0, 5, 2, None):
        before = state.lengths.tolist()
        state = fn.advance(params, state, steps)
        taken = ROOM if steps is None else steps
        lengths = [min(n + taken, limit) for n, limit in zip(before, LIMITS, strict=True)]
        assert state.lengths.tolist() == lengths
        np.testing.assert_array_equal(state.cache.length, prompts.lengths - 1 + np.array(lengths))
        for length, newest, tokens in zip(lengths, state.last.tolist(), state.tokens.tolist(), strict=True):
            assert length == 0 or newest == tokens[length - 1]
    assert state.done.all()
    made = DecodeOutput(state.tokens, state.lengths, state.stats)
    jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_steps_taken_at_a_time_compile_nothing():
    model, params = small_law_model()
    fn = make_decode_fn(model, "sample", max_new_tokens=ROOM)
    state = fn.advance(params, fn.start(params, *fn.inputs(SMALL_PROMPTS)), 1)
    before = decoding.decode._advance._cache_size()
    for steps in (2, 3, None):
        state = fn.advance(params, state, steps)
    assert decoding.decode._advance._cache_size() == before


def test_new_values_compile_nothing_and_a_new_bucket_once():
    model, params = small_law_model()
    fn = make_decode_fn(model, "sample", max_new_tokens=6)
    rng, size = np.random.default_rng(0), decoding.decode._decode._cache_size
    before = size()
    for call in range(10):
        prompts = [rng.integers(0, 5, rng.integers(1, 17)).tolist() for _ in range(3)]
        seeds = [call, jax.random.key(call), [call, 1, 2]][call % 3]
        limit = [None, call % 7, [1, 0, 6]][call % 3]
        settings = {"temperature": call / 5, "top_k": [call, 0, 1], "top_p": 1 - call / 20, "min_p": call / 30}
        fn(params, prompts, seeds, max_new_tokens=limit, **(settings if call else {}))
        assert size() - before == 1
    fn(params, [[1] * 17, [2], [3]])
    assert size() - before == 2
    fn(params, [[1] * 30, [2], [3] * 20], 4, temperature=0)
    assert size() - before == 2
    make_decode_fn(Decoder(model.config), "sample", max_new_tokens=6)(params, [[1], [2], [3]])
    assert size() - before == 2, "an equal plan compiled again"
    make_decode_fn(model, "sample", max_new_tokens=7)(params, [[1], [2], [3]])
    assert size() - before == 3, "the count would not see a compilation"


def test_compiled_halves_equal_one_call():
    model, params = small_law_model()
    fn = make_decode_fn(model, "sample", max_new_tokens=6)
    call = fn.inputs([[1, 2], [3], [4] * 9], 5, temperature=2.0)
    begin, go_on = fn.compile(params, *call)
    state = go_on(params, begin(params, *call), 2)
    assert state.lengths.tolist() == [2, 2, 2]
    state = go_on(params, state)
    np.testing.assert_array_equal(state.tokens, fn(params, [[1, 2], [3], [4] * 9], 5, temperature=2.0).tokens)


def test_decode_inside_a_larger_jit():
    model, params = small_law_model()
    fn = make_decode_fn(model, "sample", max_new_tokens=6)
    prompts, call = fn.inputs([[1, 2], [3], [4] * 9], 5, max_new_tokens=[6, 2, 4])

    @jax.jit
    def longest_and_text(params, prompts, call):
        output = decode(fn.plan, params, prompts, call)
        return output.lengths.max(), output

    longest, output = longest_and_text(params, prompts, call)
    assert int(longest) == 6
    direct = fn(params, [[1, 2], [3], [4] * 9], 5, max_new_tokens=[6, 2, 4])
    jax.tree.map(np.testing.assert_array_equal, output, direct)


def test_bfloat16_parameters():
    model, params = small_law_model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    fn = make_decode_fn(model, max_new_tokens=ROOM)
    prompts, call = fn.inputs(SMALL_PROMPTS)
    state = jax.eval_shape(lambda *args: start(fn.plan, *args), params, prompts, call)
    assert {x.dtype for x in state.cache.k + state.cache.v} == {jnp.dtype(jnp.bfloat16)}
    output = fn(params, SMALL_PROMPTS)
    assert_counts(output, [ROOM] * len(PROMPTS))
    logits = np.asarray(forward(model, params, prompts.tokens))
    last = logits[np.arange(len(PROMPTS)), prompts.lengths - 1]
    gap = np.sort(last, axis=1)[:, -1] - np.sort(last, axis=1)[:, -2]
    clear = gap > 0.1
    assert clear.sum() > len(PROMPTS) // 2
    np.testing.assert_array_equal(np.asarray(output.tokens)[clear, 0], np.argmax(last, axis=1)[clear])


# What the compiled step copies. Widths are chosen so that every array as large as a matrix or a cache is one.
_ATTENTION = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=10)
_CONFIG = DecoderConfig(
    "llama", vocab_size=67, width=44, blocks=(BlockConfig(_ATTENTION, MLPConfig(80)),) * 2, max_length=256
)
_GATES = ((0.1, 0.2, 0.3), (0.6, 0.5, 0.4))
_OPTIONS = {
    "lserve": {"budget": 12, "page": 4, "logical": 2, "reuse": 2, "gates": _GATES, "sink": 1, "local": 3},
    "streaming": {"sink": 2, "local": 4},
    "tidal": {"budget": 6, "select": (0,)},
}
_SMALLEST = 44 * 30  # the key projection; a layer's cache has 3 * 103 * 10 numbers per row
_CACHE_SIDES = {103, 10}  # slots and head width: no other array has both
_MOVE = re.compile(r"%(\S+) = (\([^()]*\)|\S+) (copy|copy-start|transpose|slice|dynamic-slice|gather|fusion)\(")
_SHAPE = re.compile(r"\w+\[([\d,]+)\]")


def large_moves(hlo: str) -> list[str]:
    """Returns the instructions that copy a matrix or (part of) the cache: moves of at least `_SMALLEST` numbers, and
    whatever else makes an array with the sides of a cache and is not a write in place.
    """
    found = []
    for line in hlo.splitlines():
        match = _MOVE.search(line)
        shapes = [[int(side) for side in shape.split(",")] for shape in _SHAPE.findall(match[2])] if match else []
        for shape in shapes:
            in_place = match[3] == "fusion" and re.match("wrapped_scatter|.*dynamic-update-slice_fusion", match[1])
            large = match[3] != "fusion" and math.prod(shape) >= _SMALLEST
            if large or (set(shape) >= _CACHE_SIDES and not in_place):
                found.append(line.strip())
    return found


# What tests/conftest.py turns off to compile fast.
AS_ALWAYS = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}


def compiled_advance(batch: int, method: str, step=advance) -> str:
    """Returns the optimised HLO of `step` for a batch, with the state donated as `DecodeFn.advance` does."""
    model = Decoder(_CONFIG)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    options = {"draft": model} if METHODS[method].drafts else _OPTIONS.get(method, {})
    params = WithDraft(params, params) if METHODS[method].drafts else params
    rows = make_decode_fn(model, method, **options).plan.steps().rows
    fn = make_decode_fn(model, method, max_new_tokens=103 - 16 - (rows - 1), **options)
    prompts, call = fn.inputs([[1, 2, 3]] * batch)
    state = jax.eval_shape(lambda *args: start(fn.plan, *args), params, prompts, call)
    assert state.cache.k[0].shape == (batch, 3, 103, 10)
    jitted = jax.jit(step, static_argnums=0, donate_argnums=2)
    return jitted.lower(fn.plan, params, state, jnp.int32(9)).compile(AS_ALWAYS).as_text()


@pytest.mark.parametrize(
    ("batch", "method"),
    [
        (1, "greedy"),
        (8, "greedy"),
        (1, "sample"),
        (1, "entropy_adaptive"),
        (1, "streaming"),
        (1, "tidal"),
        (1, "lserve"),
    ],
)
def test_compiled_steps_copy_neither_cache_nor_weights(batch, method):
    hlo = compiled_advance(batch, method)
    assert "while(" in hlo and len(re.findall(r" (?:dot|fusion|custom-call)\(", hlo)) > 20
    assert large_moves(hlo) == []


def test_corrections_of_the_cache_copy_no_cache(monkeypatch):
    monkeypatch.setitem(_OPTIONS, "tidal", {**_OPTIONS["tidal"], "correct_every": 4})
    assert large_moves(compiled_advance(1, "tidal")) == []


def test_trees_of_several_sizes_copy_no_cache():
    """Only the rows of the tree are moved: a step over any of its sizes writes the cache in place."""
    assert large_moves(compiled_advance(1, "prompt_lookup")) == []


def test_the_check_for_copies_sees_one():
    def copying(plan, params, state, max_steps):
        state = advance(plan, params, state, max_steps)
        turned = jnp.flip(jnp.swapaxes(state.cache.k[0], 2, 3), 0)
        return state, jax.lax.optimization_barrier(turned)

    assert large_moves(compiled_advance(1, "greedy", copying))


def test_the_check_for_copies_sees_one_head():
    def slicing(plan, params, state, max_steps):
        state = advance(plan, params, state, max_steps)
        return state, jnp.ones((7, 10)) @ state.cache.k[0][0, 1].T

    assert large_moves(compiled_advance(1, "greedy", slicing))


@pytest.mark.parametrize(
    ("line", "large"),
    [
        ("  %copy.3 = f32[8,3,103,10]{3,2,1,0} copy(%p)", True),
        ("  ROOT %transpose.1 = f32[103,30]{0,1} transpose(%p), dimensions={1,0}", True),
        ("  %copy-start.1 = (f32[44,67]{1,0}, f32[44,67]{1,0}, u32[]) copy-start(%p)", True),
        ("  %slice_bitcast_fusion.3 = f32[103,10]{1,0} fusion(%p), kind=kLoop", True),
        ("  %wrapped_scatter.3 = f32[3,103,10]{2,1,0} fusion(%p, %q, %r), kind=kLoop", False),
        ("  %exp_fusion.3 = f32[24,2,103]{2,1,0} fusion(%p), kind=kLoop", False),
        ("  %copy.3 = f32[8,3,1,10]{3,2,1,0} copy(%p)", False),
        ("  %copy.4 = s32[] copy(%p)", False),
        ("  %bitcast.4 = f32[8,3,103,10]{3,2,1,0} bitcast(%p)", False),
    ],
)
def test_the_check_for_copies_reads_hlo(line, large):
    assert bool(large_moves(line)) is large
