"""The losses of routers: what even and uneven choices cost, and which tokens count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import MLPConfig, MoEConfig
from models.router_losses import balance_loss, router_losses, z_loss
from tests.conftest import tiny_config

ALL = jnp.ones((2, 3), bool)


def test_even_choices_cost_k_and_one_expert_for_all_costs_e_times_its_probability():
    even = (
        jnp.zeros((2, 3, 6)).at[jnp.arange(2)[:, None], jnp.arange(3)[None, :], jnp.arange(6).reshape(2, 3)].set(1e-4)
    )
    assert balance_loss([even], 1, ALL) == pytest.approx(1.0, abs=1e-4)
    alone = jnp.zeros((2, 3, 6)).at[:, :, 2].set(3.0)
    share = np.exp(3.0) / (np.exp(3.0) + 5)
    assert balance_loss([alone], 1, ALL) == pytest.approx(6 * share, rel=1e-5)


def test_layers_are_averaged_before_the_product():
    """Two layers that send all tokens to one expert each, not the same one, are even together."""
    layers = [jnp.zeros((2, 3, 2)).at[:, :, expert].set(30.0) for expert in (0, 1)]
    assert balance_loss(layers, 1, ALL) == pytest.approx(1.0, rel=1e-5)
    assert balance_loss(layers[:1], 1, ALL) == pytest.approx(2.0, rel=1e-5)


def test_padding_does_not_count():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 4))
    real = jnp.array([[True, True, False], [True, False, False]])
    kept = scores[real][None]
    for loss in (lambda s, m: balance_loss([s], 2, m), lambda s, m: z_loss([s], m)):
        np.testing.assert_allclose(loss(scores, real), loss(kept, jnp.ones((1, 3), bool)), rtol=1e-5)
        assert jnp.isfinite(loss(scores, ~ALL))


def test_z_loss_is_the_mean_square_of_log_z():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 4))
    expected = np.square(np.log(np.exp(np.asarray(scores)).sum(axis=-1))).mean()
    np.testing.assert_allclose(z_loss([scores, scores], ALL), expected, rtol=1e-5)


def test_only_losses_with_a_weight_and_only_of_mixtures():
    config = tiny_config()
    assert router_losses(config, {}, ALL) == {}
    mixture = MoEConfig(4, 2, MLPConfig(8), balance_weight=0.5, z_weight=0.25)
    blocks = (config.blocks[0], dataclasses.replace(config.blocks[1], mlp=mixture))
    scores = jax.random.normal(jax.random.key(0), (2, 3, 4))
    routing = {"layers_1": {"mlp": {"scores": (scores,)}}}
    found = router_losses(dataclasses.replace(config, blocks=blocks), routing, ALL)
    assert set(found) == {"balance_loss", "router_z_loss"}
    np.testing.assert_allclose(found["balance_loss"], 0.5 * balance_loss([scores], 2, ALL), rtol=1e-6)
    np.testing.assert_allclose(found["router_z_loss"], 0.25 * z_loss([scores], ALL), rtol=1e-6)
