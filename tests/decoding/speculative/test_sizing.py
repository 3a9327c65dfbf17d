"""How many rows pay: the curve and where it is kept, the estimate, the choice, and trees of chosen rows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.speculative import sizing
from decoding.speculative.sizing import (
    LatencyCurve,
    acceptance,
    best_size,
    latency_curve,
    learn,
    measure,
    no_estimate,
)
from decoding.speculative.token_recycling import Memory, fill, gains, paper_template, sized
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, forward, greedy_texts, texts
from tests.support.toy_law import cyclic_model

CHEAP = LatencyCurve((1, 4, 12), (1.0, 1.0, 1.0))
DEAR = LatencyCurve((1, 4, 12), (1.0, 500.0, 6000.0))
FAIR = LatencyCurve((1, 4, 12), (1.0, 1.4, 2.1))


def test_measure_times_every_size(tiny):
    curve = measure(*tiny, (1, 3), context=8, repeats=2)
    assert curve.sizes == (1, 3) and all(0 < s < 10 for s in curve.seconds)


def test_a_curve_is_measured_once_per_model(tiny, tmp_path, monkeypatch):
    model, params = tiny
    found = []
    monkeypatch.setattr(sizing, "measure", lambda *args: found.append(args) or FAIR)
    folder = tmp_path / "latency"
    assert latency_curve(model, params, folder) == latency_curve(model, params, folder) == FAIR and len(found) == 1
    other = type(model)(dataclasses.replace(model.config, max_length=99))
    latency_curve(other, params, folder)
    assert len(found) == 2 and len(list(folder.iterdir())) == 2
    for path in folder.iterdir():
        path.write_text(json.dumps({"sizes": [2]}))
    assert latency_curve(model, params, folder) == FAIR and len(found) == 3, "a damaged file is measured again"


def test_larger_batches_cost_what_as_many_rows_cost():
    np.testing.assert_allclose(FAIR.of_batch(1), FAIR.seconds, rtol=1e-6)
    np.testing.assert_allclose(FAIR.of_batch(4), [1.4, 2.1 + 4 * 0.7 / 8, 2.1 + 36 * 0.7 / 8], rtol=1e-6)
    assert FAIR.upto(11) == LatencyCurve((1, 4), (1.0, 1.4))


@pytest.mark.parametrize(
    ("sizes", "seconds"), [((2, 4), (1.0, 1.0)), ((1, 4, 4), (1.0,) * 3), ((1, 4), (1.0,)), ((1,), (0.0,)), ((), ())]
)
def test_curves_that_cannot_be(sizes, seconds):
    with pytest.raises(InputError, match="sizes must rise|seconds must be"):
        LatencyCurve(sizes, seconds)


def test_the_estimate_starts_at_the_noted_chance_and_follows_the_counts():
    chances = jnp.asarray([[0.9, 0.05], [0.9, 0.0]], jnp.float32)
    estimate = jax.tree.map(jnp.asarray, no_estimate(2))
    rank = jnp.arange(2)[None, :]
    np.testing.assert_allclose(acceptance(estimate, chances, rank), chances, rtol=1e-6)
    hit, real = jnp.asarray([[True, False], [True, True]]), jnp.asarray([[True], [True]])
    for _ in range(50):
        estimate = learn(estimate, chances, hit, real)
    assert estimate.trials.sum() == 150 and estimate.hits.sum() == 100, "what was never noted is not counted"
    found = np.asarray(acceptance(estimate, chances, rank))
    np.testing.assert_allclose(found, [[(100 + 3.6) / 104, 0.2 / 54], [(100 + 3.6) / 104, 0.0]], rtol=1e-5)
    same = learn(estimate, chances, hit, jnp.zeros((2, 1), bool))
    jax.tree.map(np.testing.assert_array_equal, same, estimate)


def test_the_size_of_most_tokens_per_second():
    """Against all sizes tried one by one."""
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        for _ in range(20):
            chances = (rng.random((batch, 15)) ** rng.integers(1, 12)).astype(np.float32)
            active = rng.random(batch) < 0.8
            curve = LatencyCurve((1, 4, 12), (1.0, *np.sort(1 + rng.random(2) * 3).tolist()))
            ordered = np.sort(chances, axis=1)[:, ::-1]
            rates = [
                (active * (1 + ordered[:, : size - 1].sum(axis=1))).sum() / seconds
                for size, seconds in zip(curve.sizes, curve.of_batch(batch), strict=True)
            ]
            assert active.sum() == 0 or int(best_size(curve, chances, active)) == int(np.argmax(rates))


def test_gains_are_the_products_along_the_paths():
    template, rng = paper_template(), np.random.default_rng(0)
    table = rng.integers(0, 30, (30, 8), dtype=np.int32)
    memory = Memory(table, rng.random((30, 8)).astype(np.float32), no_estimate(8))
    memory = jax.tree.map(jnp.asarray, memory)
    last = np.asarray([3, 7], np.int32)
    tokens = np.asarray(fill(template, memory.table, last))
    found = np.asarray(gains(template, memory, tokens))
    for row in range(2):
        for place, path in enumerate(template.paths[1:], 1):
            token, slow = int(last[row]), 1.0
            for rank in path:
                slow *= float(memory.chances[token, rank])
                token = int(table[token, rank])
            assert token == tokens[row, place]
            np.testing.assert_allclose(found[row, place - 1], slow, rtol=1e-5)


@dataclasses.dataclass
class FakeRound:
    last: jax.Array
    done: jax.Array


@pytest.mark.parametrize(("curve", "size"), [(CHEAP, 12), (DEAR, 1)])
def test_sized_trees_are_the_likeliest_rows_and_whole(curve, size):
    template, rng = paper_template(), np.random.default_rng(1)
    table = np.stack([rng.permutation(30)[:8] for _ in range(30)]).astype(np.int32)
    memory = jax.tree.map(jnp.asarray, Memory(table, rng.random((30, 8)).astype(np.float32), no_estimate(8)))
    round_ = FakeRound(jnp.asarray([3, 7]), jnp.zeros((2,), bool))
    tree = sized(template, memory, curve, round_)
    tokens = fill(template, memory.table, round_.last)
    best = -np.sort(-np.asarray(gains(template, memory, tokens)), axis=1)[:, : size - 1]
    parent, places = np.asarray(tree.parent), np.arange(12)
    assert tree.tokens.shape == (2, 12) and ((parent >= 0).sum(axis=1) == size - 1).all()
    assert ((parent >= 0) == ((places > 0) & (places < size))[None, :]).all(), "live rows come first"
    assert (parent < places).all()
    for row in range(2):
        spelled = []
        for place in range(1, size):
            chance, at, slow = 1.0, place, 0
            while at:
                above = parent[row, at]
                rank = np.flatnonzero(table[tree.tokens[row, above]] == tree.tokens[row, at])[0]
                chance, at, slow = chance * float(memory.chances[tree.tokens[row, above], rank]), above, slow + 1
            assert slow == tree.depth[row, place]
            spelled.append(chance)
        np.testing.assert_allclose(-np.sort(-np.asarray(spelled)), best[row], rtol=1e-5)


@pytest.mark.parametrize("curve", [CHEAP, FAIR, DEAR], ids=["cheap", "fair", "dear"])
def test_no_curve_changes_the_text(tiny, curve):
    fn = make_decode_fn(tiny[0], "token_recycling", max_new_tokens=ROOM, latency=curve)
    plain = greedy_texts(*tiny, PROMPTS, ROOM)
    first = fn(tiny[1], PROMPTS)
    again = fn(tiny[1], PROMPTS, warm=first.warm)
    assert texts(first) == texts(again) == plain
    if curve is DEAR:
        assert not np.asarray(again.stats.drafted).any()
    elif curve is CHEAP:
        assert np.asarray(again.stats.steps).sum() < np.asarray(first.stats.steps).sum()


def test_a_sure_text_is_drafted_as_far_as_the_tree_goes():
    model, params = cyclic_model()
    fn = make_decode_fn(model, "token_recycling", max_new_tokens=49, latency=FAIR)
    first = fn(params, [[3]])
    again = fn(params, [[3]], warm=first.warm)
    assert int(again.stats.steps[0]) == 7 and int(first.stats.steps[0]) < 49
    logits = forward(model, params, np.arange(12, dtype=np.int32)[:, None])[:, 0]
    best = jax.lax.top_k(jax.nn.softmax(logits), 8)[0]
    np.testing.assert_allclose(again.warm.chances, best, rtol=1e-5)
    hits, trials = np.asarray(again.warm.estimate.hits), np.asarray(again.warm.estimate.trials)
    assert (hits <= trials).all() and hits[0, -1] == trials[0, -1] > 40 and not hits[1:].any()


def test_only_a_curve_will_do(tiny):
    with pytest.raises(InputError, match="latency must be a LatencyCurve"):
        make_decode_fn(tiny[0], "token_recycling", latency="fast")
