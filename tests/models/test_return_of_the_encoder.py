"""The released shape has the parameters that it is said to have; pairs have equal ones; positions may be shifted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import bidirectional_attend
from models.encoder_decoder import EncoderDecoder, init_params
from models.errors import InputError
from models.return_of_the_encoder import matched, num_parameters, released_config, split
from models.scratch import ScratchConfig, scratch_model

SHAPE = ScratchConfig(2, 32, 4, 2, 64, "gelu_tanh", False, True, max_length=64, encoder_layers=4)


def test_the_released_model_has_332_million_parameters():
    model = EncoderDecoder(released_config())
    assert num_parameters(model) == pytest.approx(332e6, rel=2e-3)
    assert (model.config.encoder.num_layers, model.config.decoder.num_layers) == (20, 10)


@pytest.mark.parametrize("reads", [0.0, 1 / 3, 0.5, 2 / 3])
@pytest.mark.parametrize("like", [SHAPE, ScratchConfig(4, 256, encoder_layers=8)], ids=["small", "large"])
def test_a_pair_has_equal_parameters(reads, like):
    """Counted without the function that matches them; rows differ in layers and in the MLPs alone."""
    shape = matched(split(like, reads), like, 258)
    assert shape.layers + shape.encoder_layers == like.layers + like.encoder_layers
    assert shape.encoder_layers == round(reads * (like.layers + like.encoder_layers))

    def count(config):
        shapes = jax.eval_shape(lambda: init_params(scratch_model(config, 258), jax.random.key(0)))
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    assert count(shape) == pytest.approx(count(like), rel=0.01)
    if not reads:
        assert shape.mlp_width > like.mlp_width, "what cross attention has more is in the MLPs"


def test_pairs_that_cannot_be():
    with pytest.raises(InputError, match="leave one that writes, got 1.0"):
        split(SHAPE, 1.0)
    with pytest.raises(InputError, match="whatever its MLPs"):
        matched(ScratchConfig(30, 32, 4, 2), SHAPE, 258)


def test_positions_of_a_source_may_all_be_shifted():
    """Scores depend on differences, so that centred positions give what those from 0 give."""
    model = scratch_model(SHAPE, 61)
    params = jax.tree.map(lambda x: x * 8.0 if x.ndim == 2 else x, init_params(model, jax.random.key(0)))
    x, lengths = jax.random.normal(jax.random.key(1), (2, 9, 32)), jnp.array([9, 5], jnp.int32)

    @jax.jit
    def stream(positions):
        def run(module):
            return module.encoder.layers(x, positions, attend=bidirectional_attend, ctx=lengths)[0]

        return model.apply({"params": params}, method=run)

    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))
    found = stream(positions)
    np.testing.assert_allclose(stream(positions - 4), found, atol=2e-4)
    assert jnp.abs(stream(2 * positions) - found).max() > 0.01
