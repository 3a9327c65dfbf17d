"""Token recycling: the table, the tree that is filled from it, and what both leave of the text: nothing changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.speculative.token_recycling import (
    NUM_SUCCESSORS,
    Memory,
    fill,
    paper_template,
    recycle,
    recycle_prompts,
    successors,
)
from decoding.speculative.tree import chain
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, forward, greedy_texts, small_law_model, texts
from tests.support.toy_law import cyclic_model

jitted_fill = jax.jit(fill, static_argnums=0)
TABLES = ("zeros", "random", "successors", "wrong successors")


def test_the_papers_tree():
    template = paper_template()
    assert template.width == 81 and template.max_depth == 6 and template.rank.max() == NUM_SUCCESSORS - 1
    assert [stop - start for start, stop in template.levels] == [8, 21, 25, 15, 8, 3]
    assert (template.parent < np.arange(81)).all()
    assert template.paths[-3:] == ((0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0))
    assert np.bincount(template.parent[1:], minlength=81)[:9].tolist() == [8, 8, 4, 3, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("template", [paper_template(), paper_template().prefix(17), chain(4)], ids=lambda t: t.width)
def test_fill_equals_a_slow_loop(template):
    rng = np.random.default_rng(0)
    table, last = rng.integers(0, 40, (40, 8), dtype=np.int32), rng.integers(0, 40, 5, dtype=np.int32)
    tokens = np.asarray(jitted_fill(template, table, last))
    assert tokens.shape == (5, template.width) and tokens.dtype == np.int32
    for row, first in zip(tokens, last, strict=True):
        slow = [int(first)]
        for parent, rank in zip(template.parent[1:], template.rank[1:], strict=True):
            slow.append(int(table[slow[parent], rank]))
        assert row.tolist() == slow


@pytest.mark.parametrize("vocab", [19, 2000])  # the larger one is searched by blocks
def test_recycle_keeps_the_last_real_row_of_each_token(vocab):
    rng = np.random.default_rng(vocab)
    table = rng.integers(0, vocab, (vocab, 8), dtype=np.int32)
    tokens = rng.integers(0, 12, 30, dtype=np.int32)
    tokens[-1] = vocab - 1
    logits = rng.normal(size=(30, vocab)).astype(np.float32)
    logits[3, 5:9] = logits[3].max() + 1  # a tie
    for real in (rng.random(30) < 0.5, np.ones(30, bool), np.zeros(30, bool)):
        best = np.asarray(jax.lax.top_k(jnp.asarray(logits), 8)[1])
        slow = table.copy()
        for row in np.flatnonzero(real):
            slow[tokens[row]] = best[row]
        batch = (jnp.asarray(x).reshape(3, 10, *x.shape[1:]) for x in (tokens, logits, real))
        tokens_of, logits_of, real_of = batch
        new = recycle(Memory(jnp.asarray(table)), tokens_of, successors(logits_of, 8, False), real_of).table
        assert new.dtype == jnp.int32
        np.testing.assert_array_equal(new, slow)


@pytest.fixture(scope="module")
def greedy(tiny) -> list[list[int]]:
    return greedy_texts(*tiny, PROMPTS, ROOM)


@pytest.fixture(scope="module")
def recycling(tiny):
    return make_decode_fn(tiny[0], "token_recycling", max_new_tokens=ROOM)


def table_of(kind: str, greedy: list[list[int]]) -> np.ndarray:
    """Returns i32[61, 8]: those of the greedy texts come first in "successors", and are not in the wrong ones."""
    if kind == "zeros":
        return np.zeros((61, 8), np.int32)
    table = np.random.default_rng(1).integers(0, 61, (61, 8), dtype=np.int32)
    for prompt, text in zip(PROMPTS, greedy, strict=True):
        whole = [prompt[-1], *text]
        for token, after in zip(whole, whole[1:], strict=False):
            if kind == "successors":
                table[token] = [after, *table[token, :-1]]
            elif kind == "wrong successors":
                table[token] = token  # eight siblings of one token, down to the leaves
    return table


@pytest.mark.parametrize("kind", TABLES)
def test_no_table_changes_the_text(tiny, recycling, greedy, kind):
    table = table_of(kind, greedy)
    output = recycling(tiny[1], PROMPTS, warm=Memory(table))
    assert texts(output) == greedy
    assert texts(recycling(tiny[1], PROMPTS[3:4], warm=Memory(table))) == greedy[3:4]
    if kind == "successors":
        assert int(output.stats.accepted.sum()) > 20


def test_counts(tiny, recycling):
    limit = [0, 1, 24, 3, 7, 23, 2, 11]
    output = recycling(tiny[1], PROMPTS, max_new_tokens=limit)
    stats = jax.tree.map(np.asarray, output.stats)
    assert stats.histogram.shape == (8, 8)
    np.testing.assert_array_equal(stats.histogram @ np.arange(8), limit)
    np.testing.assert_array_equal(stats.histogram.sum(axis=1), stats.steps)
    np.testing.assert_array_equal(stats.emitted, limit)
    np.testing.assert_array_equal(stats.drafted, 80 * stats.steps)
    assert not stats.draft_calls.any()


def cycle(start: int, num: int) -> list[int]:
    return [(start + 5 * place) % 12 for place in range(1, num + 1)]


def test_the_right_table_gives_seven_tokens_a_step():
    model, params = cyclic_model()
    logits = forward(model, params, np.arange(12, dtype=np.int32)[:, None])[:, 0]
    table = jax.lax.top_k(logits, 8)[1]
    fn = make_decode_fn(model, "token_recycling", max_new_tokens=49)
    output = fn(params, [[3], [7, 7, 8]], warm=Memory(table))
    assert texts(output) == [cycle(3, 49), cycle(8, 49)]
    assert output.stats.steps.tolist() == [7, 7] and output.stats.histogram[:, 7].tolist() == [7, 7]
    np.testing.assert_array_equal(output.warm.table, table)
    last = table.at[:, 0].set(table[:, 7]).at[:, 7].set(table[:, 0])  # the right ones on the outermost branch
    assert texts(fn(params, [[3], [7, 7, 8]], warm=Memory(last))) == texts(output)


def test_a_cold_table_learns_within_the_text_and_stays_warm():
    model, params = cyclic_model()
    fn = make_decode_fn(model, "token_recycling", max_new_tokens=49)
    first = fn(params, [[3], [3]])
    again = fn(params, [[3], [3]], warm=first.warm)
    assert texts(first) == texts(again) == [cycle(3, 49)] * 2
    assert int(again.stats.steps[0]) == 7 < int(first.stats.steps[0]) < 49
    logits = forward(model, params, np.arange(12, dtype=np.int32)[:, None])[:, 0]
    np.testing.assert_array_equal(first.warm.table, jax.lax.top_k(logits, 8)[1])


def test_the_table_that_comes_back_is_one_to_start_from(tiny, recycling, greedy):
    first = recycling(tiny[1], PROMPTS)
    assert first.warm.table.shape == (61, 8) and first.warm.table.dtype == jnp.int32
    assert texts(recycling(tiny[1], PROMPTS, warm=first.warm)) == greedy


def test_rows_that_are_done_teach_nothing(tiny, recycling):
    alone = recycling(tiny[1], PROMPTS[3:4], max_new_tokens=6)
    output = recycling(tiny[1], PROMPTS, max_new_tokens=[0, 0, 0, 6, 0, 0, 0, 0])
    np.testing.assert_array_equal(output.warm.table, alone.warm.table)
    assert np.asarray(alone.warm.table).any(axis=1).sum() > 6


@pytest.mark.parametrize(
    "warm",
    [
        Memory(np.zeros(shape, dtype))
        for shape, dtype in (((61, 7), np.int32), ((60, 8), np.int32), ((61, 8), np.float32))
    ]
    + [3, {"table": 1}],
)
def test_a_warm_value_of_another_shape(tiny, recycling, warm):
    with pytest.raises(InputError, match="warm must be the `warm` of an earlier output of method 'token_recycling'"):
        recycling(tiny[1], [[1]], warm=warm)


def test_other_mistakes(tiny, recycling):
    with pytest.raises(InputError, match=r"cache 20 slots, of which a step .* needs 80 to spare: .* to 90 or more"):
        make_decode_fn(tiny[0], "token_recycling", cache_slots=20)(tiny[1], [[1] * 10])
    for width in (1, 82):
        with pytest.raises(InputError, match=f"width must be 2 to 81 rows of the paper's tree, got {width}"):
            make_decode_fn(tiny[0], "token_recycling", width=width)
    with pytest.raises(InputError, match="warm must be"):
        make_decode_fn(tiny[0])(tiny[1], [[1]], warm=np.zeros((61, 8), np.int32))


def test_a_small_tree_in_the_smallest_cache_that_is_let_through(tiny, greedy):
    """Rows end where the cache is full, and the tree's other rows never overwrite what was kept."""
    fn = make_decode_fn(tiny[0], "token_recycling", max_new_tokens=ROOM, width=12, cache_slots=16 + 11)
    output = fn(tiny[1], PROMPTS)
    assert texts(output) == [text[: 16 - len(prompt) + 1] for text, prompt in zip(greedy, PROMPTS, strict=True)]
    np.testing.assert_array_equal(output.stats.drafted, 11 * output.stats.steps)


def test_a_vocabulary_smaller_than_the_tree_is_wide():
    steps = make_decode_fn(small_law_model()[0], "token_recycling").plan.steps()
    assert steps.cold().table.shape == (5, 5) and steps.most == 7
    assert steps.rows == sum(max(path, default=0) < 5 for path in paper_template().paths)


def test_recycled_prompts_fill_the_table(tiny):
    """The table of a first step's draft is what plain forward passes over the prompts give; text does not change."""
    model, params = tiny
    fn = make_decode_fn(model, "token_recycling", max_new_tokens=ROOM, recycle_prompt=True)
    prompts, call = fn.inputs(PROMPTS)
    table = recycle_prompts(model, params, prompts, jax.tree.map(jnp.asarray, call.warm)).table
    logits = np.asarray(forward(model, params, prompts.tokens))
    expected = np.array(call.warm.table)
    for prompt, row in zip(PROMPTS, logits, strict=True):
        for token, scores in zip(prompt, row, strict=False):
            expected[token] = np.argsort(-scores)[:NUM_SUCCESSORS]
    np.testing.assert_array_equal(table, expected)
    plain = make_decode_fn(model, "greedy", max_new_tokens=ROOM)
    assert texts(fn(params, PROMPTS)) == texts(plain(params, PROMPTS))
