"""What every adapter keeps to: a method joins by its row in `ADAPTERS` and one in `ROWS`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters import ADAPTERS, make_adapter
from finetune.adapters.adapter import LINEAR, attach, count, merge, rebase, select
from finetune.adapters.gradients import sum_gradients
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, adapter_tuning
from models.errors import InputError
from tests.support.toy_training import OBJECTIVE, toy_batch, toy_model, toy_params, updates

UPDATES = 20
TARGETS = ("v", "layers_1/mlp/*")


class Row(NamedTuple):
    """A method in the contract.

    Attributes:
        options: small ones.
        count: (I, O) -> trained numbers of a layer at the start.
        start: (kernel, gradient or None) -> the matrix that the first forward pass multiplies with.
        rate: learning rate under which 20 updates lower the loss by 0.1; only adapters move, under a random head.
        atol: how far the start may be off, where it is random.
    """

    options: dict[str, Any]
    count: Callable[[int, int], int]
    start: Callable[[np.ndarray, np.ndarray | None], np.ndarray] = lambda kernel, gradient: kernel
    rate: float = 2e-2
    atol: float = 1e-6


def first_update(kernel: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """W plus the best approximation of rank 3 of -1e-3 sign(G)."""
    u, s, v = np.linalg.svd(-1e-3 * np.sign(gradient), full_matrices=False)
    return kernel + (u[:, :3] * s[:3]) @ v[:3]


ROWS = {
    "lamda": Row({"rank": 4, "alpha": 8.0}, lambda i, o: 4 * (4 + o), atol=1e-5),
    "lamda_plus_plus": Row({"rank": 4, "alpha": 8.0}, lambda i, o: 4 * (4 + o), atol=1e-5),  # of few layers, all get R
    "lora": Row({"rank": 3, "alpha": 6.0}, lambda i, o: 3 * (i + o)),
    "lora_sb": Row({"rank": 3, "first_step": 1e-3}, lambda i, o: 9, first_update),
    "lora_xs": Row({"rank": 3, "alpha": 6.0}, lambda i, o: 9, rate=1e-1, atol=3e-4),
    "nola": Row({"rank": 3, "bases": 8}, lambda i, o: 16, rate=2e-1),
    "sora": Row({"rank": 3, "alpha": 6.0}, lambda i, o: 3 * (i + o + 1)),
}


class Run:
    """A method, its start, and 20 updates on one batch with weight decay."""

    def __init__(self, name: str) -> None:
        self.row = ROWS[name]
        self.params = toy_params()
        self.adapter = make_adapter(ADAPTERS[name][0](targets=TARGETS, **self.row.options))
        self.kernels = select(self.params, TARGETS)
        batch = toy_batch()
        self.gradients = None
        if self.adapter.needs_gradients:
            self.gradients = sum_gradients(toy_model(), OBJECTIVE, self.params, self.kernels, [batch])
        self.frozen, self.trainable = self.adapter.init(jax.random.key(1), self.kernels, self.gradients)
        self.base = rebase(self.adapter, self.params, self.frozen)
        self.before = jax.device_get((self.base, self.frozen))
        constants = Constants(self.base, self.frozen, OBJECTIVE.constants)
        config = OptimizerConfig(learning_rate=self.row.rate, schedule="constant", warmup=0, weight_decay=1e-3)
        batches = [batch] * UPDATES
        self.states, self.metrics, self.step = updates(
            adapter_tuning(self.adapter), constants, self.trainable, batches, config
        )
        self.logits = jax.jit(lambda params: toy_model().apply({"params": params}, batch.tokens[0]).logits)


@pytest.fixture(scope="module", params=sorted(ADAPTERS))
def run(request) -> Run:
    return Run(request.param)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_every_method_has_a_row():
    assert set(ROWS) == set(ADAPTERS)


def test_training_starts_where_the_paper_says(run):
    merged = select(merge(run.adapter, run.base, run.frozen, run.trainable), TARGETS)
    assert set(merged) == set(run.frozen) == set(run.trainable) == set(run.kernels)
    for path, kernel in run.kernels.items():
        gradient = None if run.gradients is None else np.asarray(run.gradients[path])
        expected = run.row.start(np.asarray(kernel), gradient)
        np.testing.assert_allclose(merged[path], expected, atol=run.row.atol, rtol=1e-5, err_msg=path)


def test_a_start_is_a_function_of_the_key_and_the_layer(run):
    """The same key gives the same values, whatever other layers are adapted."""
    path = "layers_1/attention/v"
    alone = run.adapter.init(jax.random.key(1), {path: run.kernels[path]}, run.gradients)
    for values, whole in zip(alone, (run.frozen, run.trainable), strict=True):
        assert set(values) == {path} and set(values[path]) == set(whole[path])
        for name, value in values[path].items():
            np.testing.assert_array_equal(value, whole[path][name], err_msg=name)


def test_trained_values_are_as_many_as_the_formula_says(run):
    for path, kernel in run.kernels.items():
        assert count(run.trainable[path]) == run.row.count(*kernel.shape), path
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(run.trainable))
    moments = [leaf for leaf in jax.tree.leaves(run.states[0].opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count(run.trainable), "Adam's two moments and nothing frozen"


def test_merged_parameters_give_the_logits_of_attached_ones(run):
    """After training, so that every factor counts."""
    trainable = run.states[-1].trainable
    attached = run.logits(attach(run.adapter, run.base, run.frozen, trainable))
    merged = merge(run.adapter, run.base, run.frozen, trainable)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(lambda x: (x.shape, x.dtype), run.params)
    np.testing.assert_allclose(run.logits(merged), attached, atol=1e-5)
    assert np.abs(attached - run.logits(run.params)).max() > 1e-2, "the adapter does nothing"


def test_finished_values_give_the_same_logits(run):
    trainable = run.states[-1].trainable
    finished = run.adapter.finish(run.frozen, trainable)
    assert count(finished[1]) <= count(trainable)
    expected = run.logits(attach(run.adapter, run.base, run.frozen, trainable))
    np.testing.assert_allclose(run.logits(attach(run.adapter, run.base, *finished)), expected, atol=1e-5)


def test_training_moves_the_trained_values_and_nothing_else(run):
    for name, value in flat((run.base, run.frozen)).items():
        np.testing.assert_array_equal(value, flat(run.before)[name], err_msg=name)
    start, end = flat(run.states[0].trainable), flat(run.states[-1].trainable)
    assert all((start[name] != end[name]).any() for name in start)


def test_updates_compile_once(run):
    assert run.step._cache_size() == 1


def test_the_loss_falls(run):
    losses = [metrics["loss"] for metrics in run.metrics]
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_a_rank_that_does_not_fit_is_refused(name):
    """v maps 32 features to 16."""
    kernels = select(toy_params(), LINEAR)
    options = {**ROWS[name].options, "rank": 18}
    with pytest.raises(InputError, match=r"rank 18 is larger than the smaller side of layers_0/attention/\w, 32 by 16"):
        make_adapter(ADAPTERS[name][0](**options)).init(jax.random.key(0), kernels, kernels)
    with pytest.raises(InputError, match="rank .*must be at least 1, got 0"):
        ADAPTERS[name][0](**{**options, "rank": 0})
