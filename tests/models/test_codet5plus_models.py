"""CodeT5+'s shapes: against what parts of transformers gave, and what each part does by itself."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from decoding import make_decode_fn
from models.alone import decoder_alone, encoder_alone
from models.config import config_from_dict, config_to_dict
from models.encoder_decoder import EncoderDecoder, init_params, network
from models.errors import InputError
from models.families import family_of
from models.joined import JoinConfig, Part, is_trained, join, join_config
from models.weights.assemble import parameter_shapes
from models.weights.load import load_model
from models.weights.orbax import save_model
from tests.support.codet5plus_models import GATE, joined, write_bimodal, write_embedding, written
from tests.support.tiny_models import LENGTHS, targets, tokens

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN_FOLDER / "codet5plus.json").read_text())["shapes"]
SOURCE = (jnp.asarray(tokens()), jnp.asarray(LENGTHS, jnp.int32))
T5_BASE = {"model_type": "t5", "vocab_size": 32100, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12,
           "num_heads": 12, "feed_forward_proj": "relu"}  # fmt: skip
T5_LARGE = {**T5_BASE, "d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN_FOLDER / "codet5plus.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def bimodal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codet5p") / "bimodal"
    write_bimodal(folder, SHAPES["t5"])
    return load_model(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(joined model, params, its decoder, params), its gate open."""
    return joined(tmp_path_factory.mktemp("joined"), SHAPES)


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_vectors_and_matches_of_the_bimodal_model(bimodal, golden):
    model, params, _ = bimodal
    found = model.apply({"params": params}, *SOURCE, method="embed_text")
    close(found, golden["vectors"])
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1.0, atol=1e-6)

    @jax.jit
    def match(texts, lengths):
        encoded = model.apply({"params": params}, *SOURCE, method="encode")
        return model.apply({"params": params}, texts, lengths, encoded, method="match")

    texts, lengths = written()
    close(match(texts, lengths), golden["matches"])
    behind = np.where(np.arange(12)[None, :] < lengths[:, None], texts, 17)
    assert (behind != texts).any()
    np.testing.assert_array_equal(match(behind, lengths), match(texts, lengths))  # no future is seen


def test_the_published_encoder_alone(golden, tmp_path):
    write_embedding(tmp_path / "m", SHAPES["t5"])
    model, params, _ = load_model(tmp_path / "m")
    close(model.apply({"params": params}, *SOURCE, method="embed_text"), golden["vectors"])
    with pytest.raises(InputError, match="encoder alone.*load a model with a decoder to generate"):
        make_decode_fn(model, max_new_tokens=2)(params, [[3, 4]])
    with pytest.raises(InputError, match="no head that matches"):
        model.apply({"params": params}, *SOURCE, None, method="match")


def test_an_encoder_taken_out_gives_the_same_vectors(bimodal, tmp_path):
    model, params, _ = bimodal
    alone, kept = encoder_alone(model, params)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, init_params(alone, jax.random.key(0)))
    expected = model.apply({"params": params}, *SOURCE, method="embed_text")
    np.testing.assert_array_equal(alone.apply({"params": kept}, *SOURCE, method="embed_text"), expected)
    save_model(tmp_path / "m", alone, kept)
    again = load_model(tmp_path / "m")
    assert again.model == alone
    jax.tree.map(np.testing.assert_array_equal, again.params, kept)


def test_the_joined_model(pair, golden):
    model, params, _, _ = pair
    close(model.apply({"params": params}, targets(), source=SOURCE).logits, golden["joined"])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(model.config)))) == model.config


def test_a_closed_gate_leaves_the_decoder_bit_for_bit(pair, tmp_path):
    """Operation by operation: what a compiler fuses with what is no part of the claim."""
    model, _, decoder, _ = pair
    _, fresh, _, params = joined(tmp_path, SHAPES, gate=None)
    expected = decoder.apply({"params": params}, targets()).logits
    np.testing.assert_array_equal(model.apply({"params": fresh}, targets(), source=SOURCE).logits, expected)
    fresh["decoder"]["layers_2"]["cross_gate"] = jnp.float32(GATE)
    assert np.abs(model.apply({"params": fresh}, targets(), source=SOURCE).logits - expected).max() > 1e-5


def test_the_first_layers_of_a_model_as_the_encoder(pair):
    _, params, decoder, own = pair
    settings = JoinConfig("gpt2", encoder_layers=1, cross_layers=2)
    model, found = join(Part(decoder.config, own), Part(decoder.config, own), settings, jax.random.key(0))
    assert [block.cross is None for block in model.config.decoder.blocks] == [True, False, False]
    assert set(found["encoder"]) == {"embedding", "positions", "layers_0", "final_norm"} and "bridge" not in found
    shapes = jax.tree.map(jnp.shape, init_params(model, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, found) == shapes
    np.testing.assert_array_equal(found["encoder"]["embedding"]["embedding"], own["embedding"]["embedding"])


def test_what_is_trained_of_a_joined_model(pair):
    """The encoder, the bridge and the cross-attention; every number of the decoder's own stays."""
    _, params, _, own = pair
    kept = {path for path in flatten_dict(params, sep="/") if not is_trained(path)}
    assert kept == {f"decoder/{path}" for path in flatten_dict(own, sep="/")}
    trained = {path for path in flatten_dict(params, sep="/") if is_trained(path)}
    assert {"bridge/kernel", "decoder/layers_2/cross_gate", "encoder/layers_0/mlp/up/kernel"} <= trained
    assert {"decoder/layers_2/cross/q/bias", "decoder/layers_2/cross_norm/scale"} <= trained


@pytest.mark.parametrize("which", ["bimodal", "joined"])
def test_a_decoder_by_itself_is_one_that_has_read_a_token(which, bimodal, pair):
    model, params = bimodal[:2] if which == "bimodal" else pair[:2]
    alone, kept = decoder_alone(model, params, 9)
    source = (jnp.full((3, 1), 9, jnp.int32), jnp.ones((3,), jnp.int32))
    expected = model.apply({"params": params}, targets(), source=source).logits
    close(alone.apply({"params": kept}, targets()).logits, expected)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, init_params(alone, jax.random.key(0)))


def test_a_decoder_by_itself_goes_on_with_texts(bimodal):
    model, params, _ = bimodal
    alone, kept = decoder_alone(model, params, 9)
    given = make_decode_fn(model, max_new_tokens=5)(params, [[9], [9]]).tokens
    found = make_decode_fn(alone, max_new_tokens=5)(kept, [[model.config.start_token]] * 2).tokens
    np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize(("config", "millions"), [(T5_BASE, 222.9), (T5_LARGE, 737.6)], ids=["220M", "770M"])
def test_the_sizes_of_the_published_models(config, millions):
    """Of T5's base and large shapes, which 220M and 770M are."""
    shapes = parameter_shapes(network(family_of(config).read_config(config)))
    assert sum(np.prod(leaf.shape) for leaf in shapes.values()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_what_does_not_fit_together_is_said(pair, bimodal):
    model, _, decoder, _ = pair
    with pytest.raises(InputError, match="cross_layers 4 is more than the decoder's layers, 3"):
        join_config(model.config.encoder, decoder.config, JoinConfig("t5", cross_layers=4))
    with pytest.raises(InputError, match="start_token 61 is not one of the decoder's 61 tokens"):
        join_config(model.config.encoder, decoder.config, JoinConfig("t5", start_token=61))
    with pytest.raises(InputError, match="encoder_layers 9 is more than the encoder has, 2"):
        join_config(model.config.encoder, decoder.config, JoinConfig("t5", encoder_layers=9))
    for settings in ({"cross_layers": 0}, {"encoder_layers": 0}, {"start_token": -1}):
        with pytest.raises(InputError, match="cross_layers and encoder_layers must be at least 1"):
            JoinConfig("t5", **settings)
    with pytest.raises(InputError, match="width 20 cannot read the embedding of a decoder of width 32"):
        dataclasses.replace(model.config, own_embedding=False)
    with pytest.raises(InputError, match="needs an embedding_width, and cannot have matching"):
        bare = dataclasses.replace(bimodal.model.config.decoder, blocks=())
        dataclasses.replace(bimodal.model.config, decoder=bare)
    with pytest.raises(InputError, match="the token that is read must be 0 to 60, got 61"):
        decoder_alone(*bimodal[:2], 61)
    plain = EncoderDecoder(dataclasses.replace(bimodal.model.config, embedding_width=None))
    with pytest.raises(InputError, match="gives no vector for a text"):
        plain.apply({"params": bimodal.params}, *SOURCE, method="embed_text")
    with pytest.raises(InputError, match="its encoder would be of no use"):
        encoder_alone(plain, bimodal.params)
