"""Frozen weights cost nothing: what a compiled update holds beside the frozen model, method by method."""

import functools

import jax
import jax.numpy as jnp
import pytest

from experiments.train_report import CompiledStep
from finetune.adapters import LamdaConfig, LoraConfig, LoraSbConfig, make_adapter
from finetune.adapters.adapter import count, select
from finetune.objectives import cross_entropy
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.state import Batch, Constants, adapter_tuning, full_tuning, new_state
from finetune.trainer import make_train_step
from models.scratch import ScratchConfig, scratch_model

RANK = 16
CONFIGS = {
    "full": None,
    "lora": LoraConfig(rank=RANK),
    "lora_sb": LoraSbConfig(rank=RANK),
    "lamda": LamdaConfig(rank=RANK),
}


@functools.cache
def update_of(name: str) -> tuple[int, int, int]:
    """Returns (bytes of a compiled update but for the constants, trained numbers, numbers of the optimiser)."""
    model = scratch_model(ScratchConfig(layers=2, width=256, mlp_width=768, max_length=64), 128)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    if CONFIGS[name] is None:
        method, base, frozen, trainable = full_tuning(jax.tree.map(lambda x: x.dtype, params)), {}, {}, params
    else:
        adapter = make_adapter(CONFIGS[name])
        kernels = select(params, CONFIGS[name].targets)
        frozen, trainable = adapter.init(jax.random.key(0), kernels, kernels)
        method, base = adapter_tuning(adapter), params
    config = OptimizerConfig()
    optimizer = make_optimizer(config, 10, method)
    step = CompiledStep(make_train_step(model, cross_entropy(), method, optimizer, learning_rate(config, 10)))
    state, constants = new_state(trainable, optimizer), Constants(base, frozen, None)
    tokens = jnp.zeros((1, 4, 64), jnp.int32)
    step.compiled(state, constants, Batch(tokens, jnp.ones(tokens.shape, bool), tokens + 1, tokens))
    return step.bytes(constants), count(trainable), count(state.opt_state)


@pytest.mark.parametrize(("less", "more"), [("lamda", "lora"), ("lora_sb", "lora"), ("lora", "full")])
def test_an_update_holds_less(less, more):
    assert update_of(less)[0] < update_of(more)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_optimiser_keeps_two_moments_of_what_is_trained(name):
    _, trained, kept = update_of(name)
    assert 2 * trained <= kept <= 2 * trained + 4, "beside the moments only counts of updates"
