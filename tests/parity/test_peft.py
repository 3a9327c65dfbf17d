"""Adapters beside PEFT's on transformers' models: exported files, merged weights, and training from the same start."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from finetune.adapters import ADAPTERS, LoraConfig, make_adapter
from finetune.adapters.adapter import LINEAR, attach, merge, rebase, select
from finetune.adapters.peft_export import export_peft
from finetune.objectives import cross_entropy
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.state import Batch, Constants, adapter_tuning, new_state
from finetune.trainer import make_train_step, train
from models.families import FAMILIES
from models.weights.assemble import row_of
from models.weights.load import load_model
from tests.golden.make_families import torch_model
from tests.support.moved_adapters import moved_adapter
from tests.support.tiny_models import CONFIGS

TARGETS = {"gpt2": ("o", "up", "down")}  # gpt2 keeps q, k and v in one layer
TOKENS = np.random.default_rng(0).integers(1, 61, (2, 14), dtype=np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name of a tiny model -> (torch model, made anew; our model; our parameters)."""
    folder = tmp_path_factory.mktemp("parity")

    def make(name):
        theirs = torch_model(CONFIGS[name])
        if not (folder / name).exists():
            theirs.save_pretrained(folder / name)
        ours = load_model(folder / name)
        return theirs, ours.model, ours.params

    return make


def load_peft(model, folder, trainable=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how PEFT finds the base model's vocabulary
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


CASES = [("llama", name) for name in sorted(ADAPTERS)]
CASES += [(family, "lora") for family in ("qwen2", "qwen3", "gemma3", "gpt2", "mistral")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_exported_adapters(models, family, name, tmp_path):
    """Logits of the attached and of the merged model, and merged kernels, are those of PEFT with the exported files."""
    theirs, model, params = models(family)
    _, adapter, frozen, trainable = moved_adapter(name, params, TARGETS.get(family, LINEAR))
    if name == "lora":  # ranks that differ from layer to layer, as pruning leaves them
        trainable |= {path: {"a": x["a"][:, :2], "b": x["b"][:2]} for path, x in list(trainable.items())[::3]}
    export_peft(tmp_path / "peft", model.config, "tiny", adapter, params, frozen, trainable)
    plain = torch_logits(theirs)
    wrapped = load_peft(theirs, tmp_path / "peft")
    expected = torch_logits(wrapped)
    assert np.abs(expected - plain).max() > 0.05
    base = rebase(adapter, params, frozen)
    merged = merge(adapter, base, frozen, trainable)
    apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS).logits)
    np.testing.assert_allclose(apply(attach(adapter, base, frozen, trainable)), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(apply(merged), expected, atol=1e-4, rtol=0)
    state = wrapped.merge_and_unload().state_dict()
    for path, kernel in select(merged, tuple(trainable)).items():
        row = row_of(f"{path}/kernel", FAMILIES[model.config.family].hf)
        stored = state[FAMILIES[model.config.family].prefix + row.source].numpy()
        np.testing.assert_allclose(kernel, row.convert(stored, None), atol=1e-4, rtol=0)


STEPS, RATE = 20, 0.5


def our_losses(model, params, config, batches, trainable):
    adapter = make_adapter(config)
    method, objective = adapter_tuning(adapter), cross_entropy()
    settings = OptimizerConfig("sgd", RATE, "constant", warmup=0.0, clip=None)
    optimizer = make_optimizer(settings, STEPS, method)
    step = make_train_step(model, objective, method, optimizer, learning_rate(settings, STEPS))
    losses = []
    train(
        step,
        new_state(jax.tree.map(jnp.copy, trainable), optimizer),
        Constants(params, {path: {} for path in trainable}, None),
        lambda index: batches[index],
        STEPS,
        lambda index, metrics: losses.append(metrics["loss"]),
    )
    return losses


def their_losses(model, batches):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for batch in batches:
        ids = torch.from_numpy(np.asarray(batch.tokens[0])).long()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().item())
    return losses


@pytest.mark.parametrize("alpha", [None, 12.0])
def test_lora_training(models, alpha, tmp_path):
    """The same start, data and plain gradient descent: the losses of every update agree to 1e-4."""
    theirs, model, params = models("llama")
    config = LoraConfig(rank=4, alpha=alpha)
    adapter = make_adapter(config)
    frozen, trainable = adapter.init(jax.random.key(0), select(params, config.targets), None)
    export_peft(tmp_path / "peft", model.config, "tiny", adapter, params, frozen, trainable)
    rng = np.random.default_rng(2)
    tokens = np.tile(rng.integers(1, 61, (1, 1, 4, 6), dtype=np.int32), (STEPS, 1, 1, 2))  # one batch, learnt by heart
    places = np.broadcast_to(np.arange(12, dtype=np.int32), tokens[0].shape)
    ones = np.ones(tokens[0].shape, np.int32)
    batches = [Batch(row, ones.astype(bool), ones, places) for row in tokens]
    ours = our_losses(model, params, config, batches, trainable)
    expected = their_losses(load_peft(theirs, tmp_path / "peft", trainable=True), batches)
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
