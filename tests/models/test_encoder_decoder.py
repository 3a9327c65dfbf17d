"""Encoder-decoders: T5 against logits that transformers computed, and what cached cross attention must not change."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import commit, init_cache
from models.config import RelativeConfig, config_from_dict, config_to_dict
from models.decoder import Decoder
from models.encoder_decoder import EncoderDecoder, decoder_only, init_params, network
from models.errors import InputError
from models.families import family_of
from models.layers import RelativeBias, relative_buckets
from models.weights.load import load_model
from models.weights.orbax import save_model
from tests.support.tiny_models import CONFIGS, ENCODER_DECODERS, LENGTHS, targets, tokens, write_checkpoint

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN_FOLDER / "families.json").read_text())["shapes"]
SOURCE = (jnp.asarray(tokens()), jnp.asarray(LENGTHS, jnp.int32))


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def loaded(request, tmp_path_factory):
    """(name, model, params, transformers' logits f32[3, 16, V])."""
    name = request.param
    folder = tmp_path_factory.mktemp("t5") / name
    write_checkpoint(folder, ENCODER_DECODERS[name], SHAPES[name])
    with np.load(GOLDEN_FOLDER / "families.npz") as arrays:
        golden = np.stack([arrays[f"{name}.{row}"] for row in range(len(LENGTHS))])
    model, params, _ = load_model(folder)
    return name, model, params, golden


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, written, source):
    return model.apply({"params": params}, written, source=source).logits


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_transformers(loaded):
    _, model, params, golden = loaded
    close(forward(model, params, targets(), SOURCE), golden)


def test_what_stands_behind_the_text_that_is_read_changes_nothing(loaded):
    _, model, params, golden = loaded
    noise = jnp.where(jnp.arange(14)[None, :] < SOURCE[1][:, None], SOURCE[0], 17)
    assert (noise != SOURCE[0]).any()
    close(forward(model, params, targets(), (noise, SOURCE[1])), golden)


def test_a_text_read_once_gives_the_same_logits_step_by_step(loaded):
    """The text that is written comes in passes of 9, then 1 at a time, over the cache; the other text is gone."""
    _, model, params, golden = loaded
    encoded = jax.jit(lambda *source: model.apply({"params": params}, *source, method="encode"))(*SOURCE)
    attention = [block.attention for block in model.config.decoder.blocks]
    cache = init_cache(attention, len(LENGTHS), 24, jnp.float32).replace(encoded=encoded)
    step = jax.jit(lambda written, cache: model.apply({"params": params}, written, cache=cache))
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 16)):
        if stop - start == 5:  # several again, so that keys lie behind and in the pass
            out = model.apply({"params": params}, jnp.asarray(targets()[:, start:stop]), cache=cache)
        else:
            out = step(jnp.asarray(targets()[:, start:stop]), cache)
        close(out.logits, golden[:, start:stop])
        cache = commit(out.cache, None, jnp.full((3,), stop - start, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, cache.encoded, encoded)


def test_the_buckets_of_the_paper():
    """32 buckets to distance 128: 8 exact ones each way, then ever wider ones; causal: 16 exact ones behind."""
    both, behind = (relative_buckets(RelativeConfig(32, 128, both)) for both in (True, False))
    assert both[128 - 7 : 128 + 8].tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23]
    assert (both[0], both[-1]) == (15, 31) and set(both) == set(range(32)) - {16}
    assert behind[128 - 16 : 128].tolist() == list(range(16, 0, -1)) and (behind[128:] == 0).all()
    assert behind[0] == 31 and (np.diff(behind[:129]) <= 0).all() and set(behind) == set(range(32))


def test_beyond_the_last_distance_the_last_bucket_counts():
    bias = RelativeBias(jnp.arange(10.0).reshape(2, 5))
    found = bias(jnp.array([[[-9, -2, 0, 1, 2, 50]]]))
    assert found.shape == (1, 2, 1, 6)
    np.testing.assert_array_equal(found[0, :, 0], [[0, 0, 2, 3, 4, 4], [5, 5, 7, 8, 9, 9]])


def test_a_round_trip_through_a_folder_of_our_own(loaded, tmp_path):
    _, model, params, _ = loaded
    save_model(tmp_path / "m", model, params)
    again = load_model(tmp_path / "m")
    assert again.model == model and isinstance(again.model, EncoderDecoder)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(model.config)))) == model.config


def test_what_gating_and_an_output_matrix_of_its_own_change():
    plain, gated = (family_of(config).read_config(config) for config in ENCODER_DECODERS.values())
    assert plain.tied_embeddings and not gated.tied_embeddings
    assert plain.decoder.logit_scale == pytest.approx(32**-0.5) and gated.decoder.logit_scale == 1.0
    mlps = [config.decoder.blocks[0].mlp for config in (plain, gated)]
    assert [(mlp.activation, mlp.gated) for mlp in mlps] == [("relu", False), ("gelu_tanh", True)]
    assert (plain.encoder.num_layers, plain.decoder.num_layers, plain.encoder.max_length) == (2, 3, 512)
    saved_again = {**ENCODER_DECODERS["t5_gated"], "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert family_of(saved_again).read_config(saved_again) == gated


def test_tensors_written_twice_are_passed_over_and_missing_ones_named(loaded, tmp_path):
    name, model, params, _ = loaded
    if name != "t5":
        return
    shapes = dict(SHAPES[name])
    more = {f"{stack}.embed_tokens.weight": shapes["shared.weight"] for stack in ("encoder", "decoder")}
    more |= {"lm_head.weight": shapes["shared.weight"]}
    write_checkpoint(tmp_path / "more", ENCODER_DECODERS[name], shapes | more)
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "more").params, params)
    del (
        shapes["decoder.block.2.layer.1.EncDecAttention.v.weight"],
        shapes["encoder.block.0.layer.1.DenseReluDense.wi.weight"],
    )
    write_checkpoint(tmp_path / "less", ENCODER_DECODERS[name], shapes)
    with pytest.raises(InputError) as error:
        load_model(tmp_path / "less")
    error.match("does not fit a t5 model.*decoder/layers_2/cross/v/kernel")
    error.match("encoder/layers_0/mlp/up/kernel")


def test_it_needs_a_text_to_read(loaded):
    _, model, params, _ = loaded
    with pytest.raises(InputError, match="either a cache with the encoded text in it, or the text"):
        model.apply({"params": params}, targets())


def test_models_that_are_wanted_without_an_encoder(loaded):
    _, model, _, _ = loaded
    config = family_of(CONFIGS["llama"]).read_config(CONFIGS["llama"])
    assert decoder_only(network(config), "training") == Decoder(config)
    with pytest.raises(InputError, match="training needs a decoder-only model, and this t5 model is"):
        decoder_only(model, "training")


def test_fresh_parameters_have_every_part(loaded):
    _, model, params, _ = loaded
    assert jax.tree.map(jnp.shape, init_params(model, jax.random.key(0))) == jax.tree.map(jnp.shape, params)
    bare = dataclasses.replace(model.config.decoder.blocks[0], cross=None)
    some = dataclasses.replace(model.config.decoder, blocks=(bare, *model.config.decoder.blocks[1:]))
    fewer = init_params(EncoderDecoder(dataclasses.replace(model.config, decoder=some)), jax.random.key(0))
    assert "cross" not in fewer["decoder"]["layers_0"] and "cross" in fewer["decoder"]["layers_1"]
