"""New networks: dense and mixed ones of one config, with equally many parameters at work on a token."""

import jax
import jax.numpy as jnp
import pytest

from models.config import MLPConfig
from models.errors import InputError
from models.scratch import ExpertsConfig, ScratchConfig, scratch_model

TOKENS = jnp.zeros((1, 3), jnp.int32)
SHAPE = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "max_length": 8}


def sizes(config):
    params = jax.eval_shape(scratch_model(config, 31).init, jax.random.key(0), TOKENS)["params"]
    return {name: sum(leaf.size for leaf in jax.tree.leaves(params["layers_0"][name])) for name in ("attention", "mlp")}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_as_many_parameters_are_active(active, gated):
    dense = ScratchConfig(**SHAPE, activation="gelu", gated=gated)
    mixed = ScratchConfig(**SHAPE, activation="gelu", gated=gated, experts=ExpertsConfig(6, active))
    one, many = sizes(dense), sizes(mixed)
    assert one["attention"] == many["attention"]
    assert (many["mlp"] - 16 * 6) * active == one["mlp"] * 6  # but for the router, D x E


def test_what_a_config_says_is_in_the_network():
    experts = ExpertsConfig(4, 2, "sparsity", False, form="dense", balance_weight=0.5, z_weight=0.25)
    network = scratch_model(ScratchConfig(**SHAPE, activation="relu", gated=False, experts=experts), 31).config
    mixture = network.blocks[1].mlp
    assert mixture.expert == MLPConfig(12, "relu", gated=False)
    assert (mixture.num_experts, mixture.top_k, mixture.router, mixture.form) == (4, 2, "sparsity", "dense")
    assert not mixture.router_gradient
    assert (mixture.balance_weight, mixture.z_weight) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": 4, "active": 5}, "active must be 1 to num, 4 experts; got 5"),
        ({"active": 5}, "width 24 cannot be shared by 5 active experts"),
        ({"balance_weight": -1.0}, "must not be negative, got -1.0"),
        ({"router": "sparsity"}, "set gated to false"),
    ],
)
def test_experts_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        ScratchConfig(**SHAPE, experts=ExpertsConfig(**settings))
