import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters import LamdaPlusPlusConfig, make_adapter
from finetune.adapters.adapter import LINEAR, attach, count, merge, rebase, select
from finetune.adapters.lamda import frozen_after
from finetune.adapters.lamda_plus_plus import allocate, energy
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, adapter_tuning
from models.errors import InputError
from tests.support.toy_training import toy_batch, toy_model, toy_params, updates


def kernel(decay, shape=(16, 12), seed=0):
    """A matrix whose i-th singular value is decay^i."""
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return jnp.asarray(u * decay ** np.arange(min(shape)) @ v, jnp.float32)


def test_energy_grows_to_one():
    held = np.asarray(energy(kernel(0.7)))
    squares = 0.7 ** (2 * np.arange(12))
    np.testing.assert_allclose(held, np.cumsum(squares) / squares.sum(), rtol=1e-5)
    assert np.all(np.diff(held) > -1e-7) and held[-1] == pytest.approx(1, abs=1e-6)


def test_flat_spectra_get_more_rank_and_steep_ones_less_within_the_budget():
    decays = [0.3, 0.99, 0.5, 0.8, 0.95, 0.4, 0.7, 0.6, 0.9, 0.85, 0.75, 0.65]
    ranks = allocate({f"{decay}": kernel(decay, seed=i) for i, decay in enumerate(decays)}, 4)
    expected = {0.99: 8, 0.95: 8, 0.3: 2, 0.4: 2, 0.5: 2, 0.6: 2}
    assert ranks == {f"{decay}": expected.get(decay, 4) for decay in decays}
    assert sum(ranks.values()) == 4 * len(decays)


def test_ranks_do_not_depend_on_the_kernels_size():
    kernels = {str(i): kernel(0.5 + i / 20, seed=i) for i in range(6)}
    assert allocate(kernels, 4) == allocate({path: 100.0 * value for path, value in kernels.items()}, 4)


def test_a_layer_that_is_too_small_for_twice_the_rank_is_passed_over():
    kernels = {str(i): kernel(0.5 + i / 20, seed=i) for i in range(6)} | {"5": kernel(0.99, (16, 7))}
    assert allocate(kernels, 4) == {"0": 2, "1": 2, "2": 4, "3": 4, "4": 8, "5": 4}


@pytest.mark.parametrize("size", [1, 5])
def test_of_few_layers_all_get_the_middle_rank(size):
    assert allocate({str(i): kernel(0.5 + i / 20) for i in range(size)}, 4) == {str(i): 4 for i in range(size)}


@pytest.mark.parametrize("start", ["svd", "kaiming"])
def test_the_adapter_has_these_ranks_and_trains(start):
    adapter = make_adapter(LamdaPlusPlusConfig(rank=4, start=start, freeze_share=0.5))
    kernels = select(toy_params(), LINEAR)
    ranks = allocate(kernels, 4)
    assert sorted(ranks.values()) == [2] * 4 + [4] * 8 + [8] * 2
    frozen, trainable = adapter.init(jax.random.key(1), kernels, None)
    assert {path: values["a"].shape[1] for path, values in frozen.items()} == ranks
    assert count(trainable) == sum(rank**2 + rank * kernels[path].shape[1] for path, rank in ranks.items())

    base = rebase(adapter, toy_params(), frozen)
    rate = OptimizerConfig(learning_rate=1e-2, warmup=0, schedule="constant", weight_decay=0.1)
    states, metrics, _ = updates(
        adapter_tuning(adapter), Constants(base, frozen, None), trainable, [toy_batch()] * 20, rate
    )
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    for path, rank in ranks.items():
        moved = states[4].trainable[path]["b"] != states[5].trainable[path]["b"]
        assert np.any(moved, axis=1).tolist() == (frozen_after(rank, 10) > 4).tolist()

    trained, tokens = states[-1].trainable, toy_batch().tokens[0]
    logits = [
        toy_model().apply({"params": params}, tokens).logits
        for params in (
            toy_params(),
            attach(adapter, base, frozen, trainable),
            attach(adapter, base, frozen, trained),
            merge(adapter, base, frozen, trained),
        )
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    np.testing.assert_allclose(logits[3], logits[2], atol=1e-5)


def test_an_odd_rank_is_refused():
    with pytest.raises(InputError, match="rank must be even.*got 5"):
        LamdaPlusPlusConfig(rank=5)
