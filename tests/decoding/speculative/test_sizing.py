"""How many rows pay: the curve and where it is kept, the estimate, the choice, and trees of chosen rows."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.speculative import sizing
from decoding.speculative.prompt_lookup import Draft
from decoding.speculative.prompt_lookup import gains as copies_gain
from decoding.speculative.prompt_lookup import learned as copies_learned
from decoding.speculative.sizing import LatencyCurve, best_size, latency_curve, measure, no_estimate
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
    monkeypatch.setattr(sizing, "measure", lambda *args, **context: found.append(args) or FAIR)
    folder = tmp_path / "latency"
    assert latency_curve(model, params, folder) == latency_curve(model, params, folder) == FAIR and len(found) == 1
    other = type(model)(dataclasses.replace(model.config, max_length=99))
    latency_curve(other, params, folder)
    assert len(found) == 2 and len(list(folder.iterdir())) == 2
    latency_curve(model, params, folder, context=512)
    assert len(found) == 3 and len(list(folder.iterdir())) == 3
    for path in folder.iterdir():
        path.write_text(json.dumps({"sizes": [2]}))
    assert latency_curve(model, params, folder) == FAIR and len(found) == 4, "a damaged file is measured again"


def test_larger_batches_cost_what_as_many_rows_cost():
    np.testing.assert_allclose(FAIR.of_batch(1), FAIR.seconds, rtol=1e-6)
    np.testing.assert_allclose(FAIR.of_batch(4), [1.4, 2.1 + 4 * 0.7 / 8, 2.1 + 36 * 0.7 / 8], rtol=1e-6)
    assert FAIR.upto(8) == LatencyCurve((1, 4, 8), (1.0, 1.4, 1.75)) and FAIR.upto(12) == FAIR.upto(81) == FAIR
    assert FAIR.upto(4) == LatencyCurve((1, 4), (1.0, 1.4))


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [((2, 4), (1.0, 1.0)), ((1, 4, 4), (1.0,) * 3), ((1, 4), (1.0,)), ((1,), (1.0,)), ((1, 2), (0.0, 1.0))],
)
def test_curves_that_cannot_be(sizes, seconds):
    with pytest.raises(InputError, match="sizes must rise|seconds must be"):
        LatencyCurve(sizes, seconds)


def test_the_estimate_starts_at_the_prior_and_follows_the_counts():
    place = jnp.asarray([0, 1, 1]), jnp.asarray([2, 0, 0])
    prior = jnp.asarray([0.9, 0.05, 0.1], jnp.float32)
    estimate = jax.tree.map(jnp.asarray, no_estimate((2, 3)))
    np.testing.assert_allclose(estimate.chance(place, prior), prior, rtol=1e-6)
    tried, hit = jnp.asarray([True, True, False]), jnp.asarray([True, False, True])
    for _ in range(50):
        estimate = estimate.counted(place, tried, hit)
    assert estimate.trials.sum() == 100 and estimate.hits.sum() == 50, "what was not tried is not counted"
    np.testing.assert_allclose(estimate.chance(place, prior), [53.6 / 54, 0.2 / 54, 0.4 / 54], rtol=1e-5)


def test_expectations_that_were_too_high_are_lowered():
    estimate = jax.tree.map(jnp.asarray, no_estimate((1, 1)))
    assert estimate.honest() == 1
    for accepted in (1, 0, 2, 1):
        estimate = estimate.replace(pending=jnp.float32(2.5)).settled(jnp.int32(accepted))
    ages = 0.99 ** np.arange(4)[::-1]
    honest = ((ages * [1, 0, 2, 1]).sum() + 8) / ((ages * 2.5).sum() + 8)
    np.testing.assert_allclose(estimate.honest(), honest, rtol=1e-6)
    assert estimate.pending == 0
    assert estimate.settled(jnp.int32(1000)).honest() == 1, "none is raised"


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
            rates[0] *= 1.2  # one row is left only for a gain of a fifth
            assert active.sum() == 0 or int(best_size(curve, chances, active)) == int(np.argmax(rates))


def test_gains_are_the_products_along_the_paths():
    template, rng = paper_template(), np.random.default_rng(0)
    table = rng.integers(0, 30, (30, 8), dtype=np.int32)
    memory = Memory(table, rng.random((30, 8)).astype(np.float32), no_estimate((8, 8)))
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


@pytest.mark.parametrize(("curve", "size"), [(CHEAP, 12), (DEAR, 1)])
def test_sized_trees_are_the_likeliest_rows_and_whole(curve, size):
    template, rng = paper_template(), np.random.default_rng(1)
    table = np.stack([rng.permutation(30)[:8] for _ in range(30)]).astype(np.int32)
    memory = jax.tree.map(jnp.asarray, Memory(table, rng.random((30, 8)).astype(np.float32), no_estimate((8, 8))))
    round_ = SimpleNamespace(last=jnp.asarray([3, 7]), done=jnp.zeros((2,), bool))
    tree, after = sized(template, memory, curve, round_)
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
    np.testing.assert_allclose(after.estimate.pending, best.sum(), rtol=1e-5)


@pytest.mark.parametrize("method", ["token_recycling", "prompt_lookup"])
@pytest.mark.parametrize("curve", [CHEAP, FAIR, DEAR], ids=["cheap", "fair", "dear"])
def test_no_curve_changes_the_text(tiny, curve, method):
    options = {"length": 11} if method == "prompt_lookup" else {}
    fn = make_decode_fn(tiny[0], method, max_new_tokens=ROOM, latency=curve, **options)
    plain = greedy_texts(*tiny, PROMPTS, ROOM)
    first = fn(tiny[1], PROMPTS)
    again = fn(tiny[1], PROMPTS, warm=first.warm)
    assert texts(first) == texts(again) == plain
    if curve is DEAR:
        assert not np.asarray(again.stats.drafted).any()
    elif curve is CHEAP and method == "token_recycling":
        assert all(np.asarray(output.stats.drafted).sum() > 0 for output in (first, again))


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


def test_copies_are_expected_by_their_match_and_their_place():
    estimate = jax.tree.map(jnp.asarray, no_estimate((3, 4)))
    np.testing.assert_allclose(
        copies_gain(estimate, jnp.asarray([0, 1, 3]), 4),
        [[0, 0, 0, 0], [0.5, 0.25, 0.125, 0.0625], [0.75, 0.75**2, 0.75**3, 0.75**4]],
    )
    copied = jnp.asarray([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]])
    tokens = jnp.asarray([[1, 2, 9, 0, 0], [1, 0, 0, 0, 0], [5, 6, 7, 8, 1]])
    draft = Draft(None, copied, jnp.asarray([2, 2, 0]), estimate)
    seen = SimpleNamespace(verified=SimpleNamespace(tokens=tokens), emitted=jnp.asarray([3, 1, 5]))
    found = copies_learned(draft, seen)
    np.testing.assert_array_equal(found.trials, [[0, 0, 0, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(found.hits, [[0, 0, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("method", ["token_recycling", "prompt_lookup"])
def test_only_a_curve_will_do(tiny, method):
    with pytest.raises(InputError, match="latency must be a LatencyCurve"):
        make_decode_fn(tiny[0], method, latency="fast")


@pytest.mark.parametrize("width", [16, 20, 81])
def test_trees_of_any_width_can_be_sized(tiny, width):
    """Rows that are not live stand for a template's last row, which may be live itself; the text may not see them."""
    model, params = tiny
    curve = LatencyCurve((1, 4, 8, 16), (1.0, 1.0, 1.0, 1.0))
    plain = make_decode_fn(model, max_new_tokens=ROOM)(params, PROMPTS)
    fn = make_decode_fn(model, "token_recycling", max_new_tokens=ROOM, width=width, latency=curve)
    warm = None
    for _ in range(3):  # the table fills, so that ever more rows are live
        output = fn(params, PROMPTS, warm=warm)
        assert texts(output) == texts(plain)
        warm = output.warm


def test_a_bad_start_is_forgotten():
    estimate = no_estimate((1, 1)).replace(expected=jnp.asarray(40.0), accepted=jnp.asarray(1.0))
    before = float(estimate.honest())
    for _ in range(300):
        estimate = estimate.settled(jnp.asarray(0))
    assert before < 0.3 and float(estimate.honest()) > 0.8
