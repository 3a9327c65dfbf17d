"""The split of heads by gates, and gates by their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sparse.gates import head_gates, retrieval_heads
from models.attention import dense_attend
from models.errors import InputError
from tests.support.sparse_reference import deep_model

GATES = ((0.9, 0.1), (0.8, 0.7), (0.2, 0.3), (0.0, 0.0), (0.6, 0.4))  # layer 3 has a window


@pytest.fixture(scope="module")
def deep():
    return deep_model()


def test_the_share_with_the_lowest_gates_streams():
    config = deep_model()[0].config
    assert retrieval_heads(config, GATES, 0.5) == ((0,), (0, 1), (), (), (0,))
    assert retrieval_heads(config, GATES, 0.0) == ((0, 1),) * 3 + ((),) + ((0, 1),)
    assert retrieval_heads(config, GATES, 1.0) == ((),) * 5
    assert retrieval_heads(config, None, 0.5) == ((0, 1),) * 5
    assert retrieval_heads(config, ((0.5, 0.5),) * 5, 0.5) == ((), (), (0, 1), (), (0, 1))


def test_gates_are_the_attention_that_a_window_loses(deep):
    model, params = deep
    sink, local, tokens = 2, 6, jnp.asarray(np.random.default_rng(5).integers(0, 61, (2, 40)), jnp.int32)
    gates = np.asarray(head_gates(model, params, tokens, sink=sink, local=local))
    assert gates.shape == (5, 2) and (gates[3] == 0).all() and (gates[:3] > 0).all() and (gates < 1).all()

    def attend(q, k, v, cache, ctx, *, config, layer):
        return *dense_attend(q, k, v, cache, None, config=config, layer=layer)[:2], (*ctx, (q, k))

    seen = jax.jit(functools.partial(model.apply, attend=attend, ctx=()))({"params": params}, tokens).aux
    for layer in (0, 2):
        q, k = np.asarray(seen[layer][0]), np.asarray(seen[layer][1])
        shares = np.zeros((2, 4, 40))
        for row, head, t in np.ndindex(2, 4, 40):
            scores = k[row, : t + 1, head // 2] @ q[row, t, head] * 8**-0.5
            weights = np.exp(scores - scores.max())
            shares[row, head, t] = weights[sink : max(t - local + 1, sink)].sum() / weights.sum()
        np.testing.assert_allclose(gates[layer], shares.reshape(2, 2, 2, 40).mean(axis=(0, 2, 3)), atol=1e-5)


def test_gates_need_longer_texts(deep):
    with pytest.raises(InputError, match="texts of 8 tokens have nothing between sink 4 and window 4"):
        head_gates(*deep, jnp.zeros((1, 8), jnp.int32), sink=4, local=4)
