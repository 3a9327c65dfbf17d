"""Mixtures of experts: all forms say the same, a full buffer drops what it should, MoE-X's router counts neurons."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from models.config import MLPConfig, MoEConfig
from models.errors import InputError
from models.layers import MLP
from models.moe import ROUTING, Experts, MoE, Routes, capacity, dense, gates, route, sparsity_scores, upcycled
from models.sharding import MeshConfig, abstract_mesh, make_mesh, partition, place

CONFIG = MoEConfig(5, 2, MLPConfig(12), shared=MLPConfig(6), capacity_factor=2.5)
SPARSE = MoEConfig(4, 2, MLPConfig(32, "relu", gated=False), router="sparsity")
FORMS = ("dense", "capacity", "ragged", "loop")


def inputs(shape=(2, 7, 8), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def parameters(config, width=8):
    params = MoE(config).init(jax.random.key(1), jnp.zeros((1, width)))["params"]
    return jax.tree.map(lambda w: 20.0 * w, params)


def output(config, params, x):
    return MoE(config).apply({"params": params}, x)


def as_form(config, form):
    return dataclasses.replace(config, form=form)


@pytest.mark.parametrize("tokens", [1, 14])
@pytest.mark.parametrize("form", FORMS[1:])
def test_all_forms_agree_in_values_and_gradients(form, tokens):
    params, x = parameters(CONFIG), inputs((tokens, 8))

    def loss(params, x, form):
        return jnp.square(output(as_form(CONFIG, form), params, x)).sum()

    value = jax.jit(output, static_argnums=0)
    wanted, got = (value(as_form(CONFIG, each), params, x) for each in ("dense", form))
    assert jnp.abs(wanted).max() > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    if tokens > 1:
        wanted, got = (jax.jit(jax.grad(loss), static_argnums=2)(params, x, each) for each in ("dense", form))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_the_dense_form_is_the_sum_of_the_chosen_experts():
    config = dataclasses.replace(as_form(CONFIG, "dense"), shared=None, normalise=False)
    params, x = parameters(config), np.asarray(inputs((3, 8)))
    scores = x @ np.asarray(params["router"]["kernel"])
    laws = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    up, gate, down = (np.asarray(params[f"experts_{name}"]) for name in ("up", "gate", "down"))
    expected = np.zeros_like(x)
    for row in range(3):
        for expert in np.argsort(-scores[row])[:2]:
            inner = x[row] @ gate[expert]
            expected[row] += laws[row, expert] * (inner / (1 + np.exp(-inner)) * (x[row] @ up[expert])) @ down[expert]
    np.testing.assert_allclose(output(config, params, x), expected, atol=1e-5)


def test_weights_add_up_to_one_where_they_are_normalised():
    scores = inputs((6, 5))
    weights = route(scores, CONFIG).weights
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    parts = route(scores, dataclasses.replace(CONFIG, normalise=False)).weights
    assert (parts.sum(axis=1) < 0.99).all()
    np.testing.assert_allclose(parts / parts.sum(axis=1, keepdims=True), weights, atol=1e-6)


def test_a_full_buffer_keeps_first_choices_before_second_ones_and_early_tokens_before_late_ones():
    """Expert 0 has two rows: it is the first choice of tokens 1 and 3 and the second of token 0, which it drops."""
    config = MoEConfig(3, 2, MLPConfig(12), capacity_factor=0.75)  # 0.75 * 4 * 2 / 3 = 2 rows
    params, x = parameters(config), inputs((4, 8))
    routes = Routes(jnp.array([[1, 0], [0, 2], [2, 1], [0, 2]]), jnp.array([[0.6, 0.4]] * 4))
    experts = Experts(*(params[f"experts_{name}"] for name in ("up", "gate", "down")))
    kept = gates(routes, config).at[0, 0].set(0.0).at[3, 2].set(0.0)  # expert 2: first of token 2, then of token 1
    np.testing.assert_allclose(capacity(x, experts, routes, config), dense(x, experts, kept, config.expert), atol=1e-5)


def test_scores_are_left_for_the_losses_and_nothing_else_is():
    params, x = parameters(CONFIG), inputs()
    _, left = MoE(CONFIG).apply({"params": params}, x, mutable=[ROUTING])
    (scores,) = left[ROUTING]["scores"]
    np.testing.assert_allclose(scores, x @ params["router"]["kernel"], atol=1e-4)
    assert scores.shape == (2, 7, 5) and scores.dtype == jnp.float32


@pytest.mark.parametrize("form", FORMS)
def test_experts_spread_over_devices_give_what_one_device_does(form):
    config = dataclasses.replace(as_form(CONFIG, form), num_experts=4)
    params, x = parameters(config), inputs()
    spread = place(params, make_mesh(MeshConfig(1, 1, 1, 2)))
    assert spread["experts_up"].addressable_shards[0].data.shape == (2, 8, 12)
    assert spread["router"]["kernel"].addressable_shards[0].data.shape == (8, 4)
    run = jax.jit(output, static_argnums=0)
    np.testing.assert_allclose(run(config, spread, x), run(config, params, x), atol=1e-5)


def test_experts_that_do_not_divide_are_refused():
    mesh = abstract_mesh(MeshConfig(1, 1, 1, 4))
    with pytest.raises(InputError, match="6 experts cannot be spread evenly over 4 devices.* divides 6"):
        partition("layers_0/mlp/experts_up", (6, 8, 12), mesh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 6}, "top_k must be 1 to num_experts, 5; got 6"),
        ({"expert": MLPConfig(12, bias=True)}, "experts have no biases"),
        ({"router": "sparsity"}, "a gated one has two: set gated to false"),
    ],
)
def test_mixtures_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


class TestSparsityRouter:
    """MoE-X (2503.07639)."""

    def up(self, seed=3, shape=(4, 8, 32)):
        return jax.random.normal(jax.random.key(seed), shape) + 0.3 * jax.random.normal(
            jax.random.key(seed + 1), (*shape[:2], 1)
        )

    def test_the_closed_form(self):
        x, up = np.asarray(inputs((5, 8)), np.float64), np.asarray(self.up(), np.float64)
        scores = sparsity_scores(jnp.asarray(x, jnp.float32), jnp.asarray(up, jnp.float32))
        for expert in range(4):
            mean, deviation = x @ up[expert].mean(axis=1), np.sqrt(x**2 @ up[expert].var(axis=1))
            np.testing.assert_allclose(scores[:, expert], -erf(mean / (deviation * math.sqrt(2))), atol=1e-5)
        assert (np.abs(scores) < 1).all() and np.ptp(scores) > 0.5

    def test_what_scaling_and_signs_do(self):
        x, up = inputs((5, 8)), self.up()
        scores = sparsity_scores(x, up)
        np.testing.assert_allclose(
            sparsity_scores(x, up.at[1].multiply(-1.0)), scores.at[:, 1].multiply(-1.0), atol=1e-6
        )
        np.testing.assert_allclose(sparsity_scores(x, up.at[2].multiply(3.0)), scores, atol=1e-5)
        np.testing.assert_allclose(sparsity_scores(7.0 * x, up), scores, atol=1e-5)
        assert jnp.isfinite(sparsity_scores(jnp.zeros((1, 8)), up)).all()

    def test_it_foretells_how_many_neurons_fire(self):
        """Columns drawn from a normal law of their own mean: counts within three deviations, which 1 % may leave."""
        x, count = inputs((50, 16)), 4000
        up = self.up(shape=(3, 16, count))
        share = 0.5 * (1.0 - sparsity_scores(x, up))
        fired = (jnp.einsum("nd,edf->nef", x, up) > 0).mean(axis=-1)
        error = jnp.abs(fired - share) / jnp.sqrt(share * (1 - share) / count)
        assert (error < 3).mean() > 0.98
        assert np.corrcoef(share.ravel(), fired.ravel())[0, 1] > 0.99

    def test_the_router_has_no_parameters_and_its_gradient_reaches_the_experts(self):
        params = parameters(SPARSE)
        assert set(params) == {"experts_up", "experts_down"}

        def chosen(up):
            return route(sparsity_scores(inputs((5, 8)), up), SPARSE).weights[:, 0].sum()

        assert jnp.abs(jax.grad(chosen)(params["experts_up"])).max() > 1e-4

    def test_the_gradient_through_the_router_can_be_left_out(self):
        params, x = parameters(SPARSE), inputs((5, 8))
        out = {}
        for flag in (True, False):
            config = dataclasses.replace(SPARSE, router_gradient=flag, form="dense")

            def scored(params, config=config):
                scores = MoE(config).apply({"params": params}, x, mutable=[ROUTING])[1][ROUTING]["scores"][0]
                return jnp.square(scores).sum()

            out[flag] = jax.value_and_grad(scored)(params)
        assert out[True][0] == out[False][0]
        assert jnp.abs(out[True][1]["experts_up"]).max() > 1e-4 and not jnp.any(out[False][1]["experts_up"])

    def test_it_is_one_wide_mlp_with_a_masked_hidden_vector(self):
        config = as_form(SPARSE, "dense")
        params, x = parameters(config), inputs()
        out, left = MoE(config).apply({"params": params}, x, mutable=["intermediates"])
        (inner,) = left["intermediates"]["inner"]
        assert inner.shape == (2, 7, 4 * 32)
        blocks = (np.asarray(inner).reshape(-1, 4, 32) != 0).any(axis=-1)
        assert (blocks.sum(axis=1) <= 2).all() and blocks.any()
        wide = params["experts_down"].reshape(4 * 32, 8)
        np.testing.assert_allclose(out, inner @ wide, atol=1e-5)
        np.testing.assert_allclose(output(SPARSE, params, x), out, atol=1e-5)

    def test_all_experts_with_equal_weights_are_their_sum(self):
        config = dataclasses.replace(SPARSE, num_experts=3, top_k=3)
        params, x = parameters(config), inputs((5, 8))
        params["experts_up"] = jnp.repeat(params["experts_up"][:1], 3, axis=0)  # equal scores
        hidden = jax.nn.relu(x @ params["experts_up"][0])
        expected = sum(hidden @ params["experts_down"][expert] for expert in range(3)) / 3
        np.testing.assert_allclose(output(config, params, x), expected, atol=1e-5)


@pytest.mark.parametrize("config", [SPARSE, MoEConfig(4, 2, MLPConfig(12))])
def test_a_mixture_of_copies_starts_as_the_mlp(config):
    mlp, x = MLP(config.expert), inputs((5, 8))
    params = jax.tree.map(lambda w: 20.0 * w, mlp.init(jax.random.key(2), x)["params"])
    router = None if config.router == "sparsity" else jax.random.normal(jax.random.key(3), (8, 4))
    mixture = upcycled(params, config, router)
    assert jax.tree.map(jnp.shape, mixture) == jax.tree.map(jnp.shape, parameters(config))
    expected = mlp.apply({"params": params}, x)
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(output(config, mixture, x), expected, atol=1e-5)


def test_narrower_experts_share_the_neurons_out():
    """All experts with equal weights are the MLP, and so are the two of one sharing: those of a pair hold each neuron.

    Both by the experts' own formula, in which no order of neurons occurs.
    """
    mlp, x = MLPConfig(24, "gelu", gated=True), inputs((5, 8))
    params = jax.tree.map(lambda w: 20.0 * w, MLP(mlp).init(jax.random.key(2), x)["params"])
    config = MoEConfig(6, 2, dataclasses.replace(mlp, width=12))
    experts = Experts(*(upcycled(params, config)[f"experts_{name}"] for name in ("up", "gate", "down")))
    expected = MLP(mlp).apply({"params": params}, x)
    assert jnp.abs(expected).max() > 0.1
    for weights in ((1 / 6,) * 6, (0.5, 0.5, 0, 0, 0, 0), (0, 0, 0, 0, 0.5, 0.5)):
        out = dense(x, experts, jnp.tile(jnp.array(weights), (5, 1)), config.expert)
        np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (
        jnp.abs(dense(x, experts, jnp.tile(jnp.array([0, 0.5, 0.5, 0, 0, 0]), (5, 1)), config.expert) - expected).max()
        > 0.01
    )
    assert not np.allclose(experts.up[0], experts.up[2]), "every sharing has an order of its own"


@pytest.mark.parametrize(("num", "width"), [(4, 5), (3, 6)])
def test_widths_that_cannot_be_shared_out(num, width):
    params = MLP(MLPConfig(12)).init(jax.random.key(2), inputs((5, 8)))["params"]
    with pytest.raises(InputError, match=f"width 12 cannot become {num} experts of width {width}"):
        upcycled(params, MoEConfig(num, 2, MLPConfig(width)))
