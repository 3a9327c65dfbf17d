"""Streaming attention against a slow reference and against dense decoding."""

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.autoregressive import DENSE
from decoding.method import Policy
from decoding.sparse import streaming
from decoding.sparse.streaming import streaming_attend
from models.attention import TreeRows, tree_attend
from models.cache import init_cache
from models.errors import InputError
from tests.support.decode_reference import texts
from tests.support.sparse_reference import Rule, deep_model, fast_logits, slow_logits

LENGTHS = (1, 30, 13, 3)
PROMPTS = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in LENGTHS]
NEW = 8


class StreamingRule(Rule):
    """The first and the last tokens."""

    def __init__(self, sink: int, local: int):
        self.sink, self.local = sink, local

    def choose(self, layer, config, q, keys):
        place, newest = np.arange(len(keys)), len(keys) - 1
        seen = (place < self.sink) | (place > newest - self.local)
        return np.broadcast_to(seen, (config.num_heads, len(keys)))


@pytest.fixture(scope="module")
def deep():
    return deep_model(softcap=20.0, scale=0.3)


@pytest.fixture(scope="module")
def forced() -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 61, (len(PROMPTS), NEW)).tolist()


@pytest.fixture(scope="module")
def dense_logits(deep, forced):
    return fast_logits(*deep, DENSE, PROMPTS, forced)


@pytest.mark.parametrize(("sink", "local"), [(0, 1), (5, 3)])
def test_equals_the_slow_reference_on_a_ragged_batch(deep, forced, sink, local):
    fast = fast_logits(*deep, Policy(streaming_attend(sink, local)), PROMPTS, forced)
    for row, prompt in enumerate(PROMPTS):
        slow = slow_logits(*deep, StreamingRule(sink, local), prompt, forced[row])
        np.testing.assert_allclose(fast[row], slow, rtol=1e-3, atol=1e-3)
    other = slow_logits(*deep, StreamingRule(sink, local + 1), PROMPTS[1], forced[1])
    assert np.abs(fast[1] - other).max() > 0.05, "a window that is one too long must show"


@pytest.mark.parametrize(("sink", "local"), [(96, 1), (2, 500)])
def test_with_every_token_seen_it_is_dense(deep, forced, dense_logits, sink, local):
    fast = fast_logits(*deep, Policy(streaming_attend(sink, local)), PROMPTS, forced)
    np.testing.assert_allclose(fast, dense_logits, rtol=1e-5, atol=2e-5)


def test_with_every_token_seen_it_writes_greedy_text(tiny):
    model, params = tiny
    greedy = make_decode_fn(model, max_new_tokens=24)(params, PROMPTS)
    fn = make_decode_fn(model, "streaming", max_new_tokens=24, sink=1, local=64)
    assert texts(fn(params, PROMPTS)) == texts(greedy)


@pytest.mark.parametrize("length", [0, 1, 4, 20])
def test_rows_of_a_tree_see_sink_window_and_ancestors(deep, length):
    """Against dense tree attention with the slots in between hidden by values far below all others."""
    config = deep[0].config.blocks[0].attention
    rng = np.random.default_rng(length)
    width, sink, local = 5, 3, 4
    ancestors = jnp.asarray([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]], bool)
    depth = np.array([0, 1, 1, 2, 3])
    rows = TreeRows(ancestors[None], jnp.asarray(depth)[None])
    q, k, v = (jnp.asarray(rng.normal(size=(1, width, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    cache = init_cache([config], 1, 32, jnp.float32).layer(0)
    stored = jnp.asarray(rng.normal(size=(2, 1, 2, 32, 8)), jnp.float32)
    cache = cache.replace(k=stored[0], v=stored[1], length=jnp.array([length]))
    out = np.asarray(streaming_attend(sink, local)(q, k, v, cache, rows, config=config, layer=0)[0])
    for row in range(width):
        position = length + depth[row]
        kept = [slot for slot in range(length) if slot < sink or slot > position - local]
        near = [
            j for j in range(width) if ancestors[row, j] and (depth[j] > depth[row] - local or length + depth[j] < sink)
        ]
        keys = jnp.concatenate([cache.k[:, :, kept], jnp.swapaxes(k[:, near], 1, 2)], axis=2)
        values = jnp.concatenate([cache.v[:, :, kept], jnp.swapaxes(v[:, near], 1, 2)], axis=2)
        short = cache.replace(k=keys, v=values, length=jnp.array([keys.shape[2] - 1]))
        one = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32))
        new = [jnp.swapaxes(x[:, :, -1:], 1, 2) for x in (keys, values)]
        alone = tree_attend(q[:, row : row + 1], *new, short, one, config=config, layer=0)[0]
        np.testing.assert_allclose(out[:, row], alone[:, 0], atol=1e-5)


def test_the_comparison_sees_a_sink_that_is_lost(deep, forced, monkeypatch):
    """A planted bug: the window takes the place of the sink."""
    real = streaming.window_attention
    monkeypatch.setattr(streaming, "window_attention", lambda *args, sink, **rest: real(*args, sink=0, **rest))
    fast = fast_logits(*deep, Policy(streaming_attend(2, 5)), PROMPTS, forced)
    slow = slow_logits(*deep, StreamingRule(2, 5), PROMPTS[1], forced[1])
    assert np.abs(fast[1] - slow).max() > 0.1


@pytest.mark.parametrize("options", [{"sink": -1}, {"local": 0}])
def test_wrong_options_are_refused(deep, options):
    with pytest.raises(InputError, match="sink must be 0 or more and local 1 or more"):
        make_decode_fn(deep[0], "streaming", **options)
