"""Grown models: which layers stand where, copies that begin as nothing, contexts that change nothing at first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, MoEConfig, RopeConfig
from models.decoder import Decoder
from models.errors import InputError
from models.growth import GrowthConfig, doubled_order, grow, layer_cosines, most_alike
from models.scratch import ExpertsConfig
from tests.conftest import tiny_config

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)), jnp.int32)


@pytest.fixture(scope="module", params=["plain", "biases and post-norms"])
def old(request):
    rich = request.param != "plain"
    attention = AttentionConfig(2, 1, 8, out_bias=rich, qkv_bias=rich)
    block = BlockConfig(attention, MLPConfig(24, bias=rich), post_norms=rich)
    model = Decoder(DecoderConfig("llama", 31, 16, (block,) * 3, 32))
    shapes = model.init(jax.random.key(0), TOKENS)["params"]
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(shapes))))
    return model, jax.tree.map(lambda x: 0.5 * jax.random.normal(next(keys), x.shape) + float(x.ndim == 1), shapes)


def logits(model, params):
    return np.asarray(model.apply({"params": params}, TOKENS).logits)


def test_the_papers_order():
    assert doubled_order(32, GrowthConfig((12, 28))) == [*range(28), *range(12, 32)]
    assert len(doubled_order(32, GrowthConfig((12, 28)))) == 48


@pytest.mark.parametrize("double", [(0, 2), (1, 2), (0, 3)])
def test_copies_that_begin_as_nothing(old, double):
    grown, params = grow(*old, GrowthConfig(double, identity=True))
    assert grown.config.num_layers == 3 + double[1] - double[0]
    np.testing.assert_array_equal(logits(grown, params), logits(*old))


def test_copies_of_experts_begin_as_nothing():
    """What is shared by all tokens among them, and with weights that can be learned."""
    experts = MoEConfig(4, 2, MLPConfig(24), shared=MLPConfig(16))
    config = tiny_config()
    blocks = (config.blocks[0], dataclasses.replace(config.blocks[1], mlp=experts))
    model = Decoder(dataclasses.replace(config, blocks=blocks))
    params = model.init(jax.random.key(1), TOKENS)["params"]
    grown, after = grow(model, params, GrowthConfig((0, 2), identity=True))
    np.testing.assert_allclose(logits(grown, after), logits(model, params), atol=1e-5)
    assert np.asarray(after["layers_3"]["mlp"]["shared"]["up"]["kernel"]).any()


def test_copies_have_the_weights_of_their_layer_and_change_the_logits(old):
    model, before = old
    grown, params = grow(model, before, GrowthConfig((1, 3)))
    for new, source in enumerate([0, 1, 2, 1, 2]):
        for path, value in flatten_dict(params[f"layers_{new}"]).items():
            np.testing.assert_array_equal(value, flatten_dict(before[f"layers_{source}"])[path])
    assert params["layers_3"]["mlp"]["up"]["kernel"] is not params["layers_1"]["mlp"]["up"]["kernel"]
    assert np.abs(logits(grown, params) - logits(*old)).max() > 1e-2


@pytest.mark.parametrize("growth", [GrowthConfig(), GrowthConfig((1, 1)), GrowthConfig(max_length=64)])
def test_nothing_to_change(old, growth):
    grown, params = grow(*old, growth)
    np.testing.assert_array_equal(logits(grown, params), logits(*old))


def test_a_longer_context(old):
    model, before = old
    same, params = grow(model, before, GrowthConfig(rope_theta=10_000.0, max_length=64))
    assert same.config.max_length == 64
    np.testing.assert_array_equal(logits(same, params), logits(*old))
    other, params = grow(model, before, GrowthConfig(rope_theta=1e6))
    assert {block.attention.rope for block in other.config.blocks} == {RopeConfig(1e6)}
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params, before))
    difference = np.abs(logits(other, params) - logits(*old)).max(axis=(0, 2))
    assert difference[0] < 1e-5 < 1e-4 < difference[1:].min(), "the first position is not rotated"


def test_cosines_of_layers(old):
    model, params = old
    grown, more = grow(model, params, GrowthConfig((0, 2), identity=True))
    cosines = np.asarray(layer_cosines(grown, more, TOKENS))
    hidden = model.apply({"params": params}, TOKENS, collect=(0, 1)).hidden
    a, b = (np.asarray(hidden[i], np.float64) for i in (0, 1))
    expected = np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
    np.testing.assert_allclose(cosines[0], expected, rtol=1e-5)
    np.testing.assert_allclose(cosines[2:4], 1.0, rtol=1e-6)
    assert cosines[[0, 1, 4]].max() < 0.999
    assert most_alike(jnp.asarray(cosines), 2) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"double": (1, 4)}, r"\[1, 4\] does not fit a model of 3 layers"),
        ({"double": (2, 1)}, "first and one past the last"),
        ({"double": (1,)}, "first and one past the last"),
        ({"identity": True}, "set double too"),
        ({"rope_theta": 1.0}, "above 1"),
        ({"max_length": 16}, "less than the model's context of 32"),
    ],
)
def test_growth_that_does_not_fit(old, settings, message):
    with pytest.raises(InputError, match=message):
        grow(*old, GrowthConfig(**settings))


def test_models_without_rotary_positions():
    block = BlockConfig(AttentionConfig(2, 1, 8, rope=None), MLPConfig(24))
    model = Decoder(DecoderConfig("gpt2", 31, 16, (block,), 32, learned_positions=True))
    for growth, message in ((GrowthConfig(rope_theta=1e6), "no rotary"), (GrowthConfig(max_length=64), "learned")):
        with pytest.raises(InputError, match=message):
            grow(model, {}, growth)


@pytest.mark.parametrize("router", ["learned", "sparsity"])
def test_mlps_become_experts(router):
    block = BlockConfig(AttentionConfig(2, 1, 8), MLPConfig(24, "relu", gated=False))
    model = Decoder(DecoderConfig("llama", 31, 16, (block,) * 2, 32))
    params = jax.tree.map(lambda x: 10 * x, model.init(jax.random.key(0), TOKENS)["params"])
    grown, more = grow(model, params, GrowthConfig(experts=ExpertsConfig(4, 2, router)))
    shapes = jax.eval_shape(grown.init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(jnp.shape, shapes)
    copies, same = grow(model, params, GrowthConfig(experts=ExpertsConfig(4, 1, router)))
    np.testing.assert_allclose(logits(copies, same), logits(model, params), atol=1e-5)
    with pytest.raises(InputError, match="experts are made of MLPs"):
        grow(grown, more, GrowthConfig(experts=ExpertsConfig()))


def test_counts_of_layers_to_double():
    with pytest.raises(InputError, match="1 to 3"):
        most_alike(jnp.ones(3), 4)
