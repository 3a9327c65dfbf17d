"""Every family variant beside transformers' own model, live: logits to 1e-4 in float32 on a ragged batch."""

import json

import jax
import numpy as np
import pytest
import torch

from decoding import make_decode_fn
from models.cache import commit, init_cache
from models.moe import ROUTING
from models.router_losses import balance_loss, router_losses
from models.weights.load import load_model
from tests.golden.make_families import logits, torch_model
from tests.support.tiny_models import CONFIGS, ENCODER_DECODERS, LENGTHS, targets, tokens


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(torch model, our model, our parameters), ours loaded from what transformers' `save_pretrained` writes."""
    theirs = torch_model(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp("parity") / request.param
    theirs.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == CONFIGS[request.param]["model_type"]
    ours = load_model(folder)
    return theirs, ours.model, ours.params


def test_logits_of_a_ragged_batch(pair):
    theirs, model, params = pair
    ours = model.apply({"params": params}, tokens()).logits
    for row, expected in enumerate(logits(theirs)):
        np.testing.assert_allclose(ours[row, : LENGTHS[row]], expected, atol=1e-4, rtol=0)


def test_logits_through_the_cache(pair):
    """Ragged prompts of all but the last three tokens in one pass, then token by token."""
    theirs, model, params = pair
    step = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, cache=cache))
    prompt = np.maximum(np.array(LENGTHS) - 3, 0).astype(np.int32)
    cache = init_cache([b.attention for b in model.config.blocks], len(LENGTHS), 24, np.float32)
    cache = commit(step(tokens(), cache).cache, None, prompt)
    expected = logits(theirs)
    for offset in range(3):
        position = np.minimum(prompt + offset, np.array(LENGTHS) - 1)
        output = step(tokens()[np.arange(len(LENGTHS)), position][:, None], cache)
        cache = commit(output.cache, None, np.ones(len(LENGTHS), np.int32))
        for row, length in enumerate(LENGTHS):
            if prompt[row] + offset < length:
                np.testing.assert_allclose(output.logits[row, 0], expected[row][position[row]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders(name, tmp_path):
    """A ragged batch that is read, and greedy text of transformers' own loop."""
    theirs = torch_model(ENCODER_DECODERS[name])
    theirs.save_pretrained(tmp_path)
    model, params, _ = load_model(tmp_path)
    lengths = np.array(LENGTHS, np.int32)
    ours = model.apply({"params": params}, targets(), source=(tokens(), lengths)).logits
    for row, expected in enumerate(logits(theirs)):
        np.testing.assert_allclose(ours[row], expected, atol=1e-4, rtol=0)
    mask = torch.from_numpy((np.arange(14)[None, :] < lengths[:, None]).astype(np.int64))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "decoder_start_token_id": 0}
    options["use_cache"] = False  # theirs counts the encoder's layers
    written = theirs.generate(torch.from_numpy(tokens()).long(), attention_mask=mask, **options).numpy()[:, 1:]
    prompts = [row[:length].tolist() for row, length in zip(tokens(), LENGTHS, strict=True)]
    np.testing.assert_array_equal(make_decode_fn(model, max_new_tokens=6)(params, prompts).tokens, written)


def test_the_balance_loss_of_a_ragged_batch():
    """Router scores of both networks, and the loss over them, without the tokens behind each row's length."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = np.random.default_rng(0).standard_normal((3, len(LENGTHS), 14, 5)).astype(np.float32)
    real = np.arange(14)[None, :] < np.array(LENGTHS)[:, None]
    theirs = load_balancing_loss_func(
        tuple(torch.from_numpy(layer.reshape(-1, 5)) for layer in scores), 5, 2, torch.from_numpy(real.astype(np.int64))
    )
    np.testing.assert_allclose(balance_loss(list(jax.numpy.asarray(scores)), 2, real), theirs.item(), rtol=1e-5)


@pytest.mark.parametrize("pair", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"], indirect=True)
def test_the_balance_loss_of_a_model(pair):
    """What transformers adds to the loss of a row is what our trainer does."""
    theirs, model, params = pair
    row = tokens()[:1]
    expected = theirs(torch.from_numpy(row).long(), output_router_logits=True).aux_loss.item()
    left = model.apply({"params": params}, row, mutable=[ROUTING])[1][ROUTING]
    weight = model.config.blocks[1].mlp.balance_weight
    assert weight == theirs.config.router_aux_loss_coef
    found = router_losses(model.config, left, np.ones(row.shape, bool))["balance_loss"]
    np.testing.assert_allclose(found / weight, expected, rtol=1e-4)
