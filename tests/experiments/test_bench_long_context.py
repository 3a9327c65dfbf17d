"""The benchmark of long contexts on a tiny model: its last line, its page, and steps that are whole decoding steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from experiments import bench_long_context
from experiments.bench_long_context import Attention, LongContextBenchConfig, Side, Step, measure, page, random_cache
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

LSERVE = {"budget": 12, "page": 4, "logical": 2, "reuse": 2}


def test_last_line_and_page(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    model = write_tiny_folder(tmp_path / "tiny", max_length=128)
    config = tmp_path / "bench.yaml"
    sides = [{"name": "dense"}, {"name": "pages", "method": "lserve", "options": LSERVE}]
    config.write_text(json.dumps({"model": str(model), "contexts": [60], "steps": 3, "repeats": 1, "sides": sides}))
    bench_long_context.main(["--config", str(config), "--out", str(tmp_path / "out")])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for what in ("attention", "step"):
        assert {context: set(times) for context, times in figures[what].items()} == {"60": {"dense", "pages"}}
        assert all(time > 0 for times in figures[what].values() for time in times.values())
    text = (tmp_path / "out" / "table.md").read_text()
    assert '- pages: lserve {"budget": 12' in text and "| | 60 tokens | growth |" in text


def test_the_page_says_how_much_faster_and_how_costs_grow():
    config = LongContextBenchConfig(contexts=(10, 20), sides=(Side(), Side("other", "streaming")))
    times = {10: {"dense": 4.0, "other": 2.0}, 20: {"dense": 8.0, "other": 2.5}}
    text = page(config, {"attention": times, "step": times})
    assert text.count("| other | 2.0 (2.00) | 2.5 (3.20) | 1.25 |") == 2
    assert text.count("| dense | 4.0 (1.00) | 8.0 (1.00) | 2.00 |") == 2


@pytest.mark.parametrize(("method", "options"), [("sample", {}), ("lserve", LSERVE)])
def test_what_is_timed_is_the_methods_own_step(tiny, method, options):
    """The timed state, advanced, is what decoding behind the same cache gives; attention alone writes as many rows."""
    fn = make_decode_fn(tiny[0], method, max_new_tokens=4, cache_slots=34, **options)
    step = Step(fn, tiny[1], 30, 4)
    assert step() > 0
    state = step.begin(tiny[1], *fn.inputs([[1]], temperature=0.0))
    layers = [block.attention for block in tiny[0].config.blocks]
    for mine, fresh in zip(state.cache.k, random_cache(layers, 30, 34, jnp.float32).k, strict=True):
        np.testing.assert_array_equal(mine, fresh)
    assert state.cache.length.tolist() == [30] and not state.done.any()
    after = fn.advance(tiny[1], state)
    assert after.lengths.tolist() == [4] and after.cache.length.tolist() == [34]
    attention = Attention(fn, 30, 4)
    cache, memory, last = attention.run(*attention.begin())
    assert cache.length.tolist() == [34] and bool(jnp.isfinite(last))
    old = random_cache(layers, 30, 34, jnp.float32)
    for new, before in zip(jax.tree.leaves((cache.k, cache.v)), jax.tree.leaves((old.k, old.v)), strict=True):
        np.testing.assert_array_equal(new[:, :, :30], before[:, :, :30])
        assert (np.asarray(new[:, :, 30:]) != np.asarray(before[:, :, 30:])).any(axis=3).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"contexts": (20, 10)}, "rising order"),
        ({"sides": (Side(), Side())}, "names of their own"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_wrong_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LongContextBenchConfig(**values)


def test_contexts_beyond_the_models_are_refused(tiny):
    with pytest.raises(InputError, match="room for 16 steps in the model's 256 tokens, got 250"):
        measure(LongContextBenchConfig(contexts=(10, 250)), *tiny)
