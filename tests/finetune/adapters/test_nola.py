import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters import NolaConfig, make_adapter
from finetune.adapters.adapter import attach, count, merge, select
from finetune.adapters.nola import START, basis, mixture
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, adapter_tuning
from finetune.trainer import summed_loss
from models.errors import InputError
from tests.support.toy_training import OBJECTIVE, toy_batch, toy_model, toy_params, updates

TARGETS = ("q", "down")
SHAPE = (10, 3)
KEY = jax.random.key(3)


def start(targets=TARGETS, **options):
    config = NolaConfig(**{"rank": 4, "bases": 12, "targets": targets} | options)
    adapter = make_adapter(config)
    return adapter, *adapter.init(jax.random.key(1), select(toy_params(), targets), None)


def factors(adapter, frozen, trainable, path):
    return adapter.factors(frozen[path], trainable[path], select(toy_params(), TARGETS)[path].shape)


def correction(adapter, frozen, trainable, path):
    a, _, b, scale = factors(adapter, frozen, trainable, path)
    return scale * np.asarray(a, np.float64) @ np.asarray(b, np.float64)


def random_mix(trainable, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), trainable)


def kept_basis(size):
    return jnp.stack([basis(KEY, index, SHAPE) for index in range(size)])


@pytest.mark.parametrize("chunk", [1, 4, 7, 50])
def test_a_mixture_and_its_gradient_are_those_of_a_basis_that_is_kept(chunk):
    c, g = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((1, (11,)), (2, SHAPE)))
    value, pull = jax.vjp(lambda c: mixture(KEY, c, SHAPE, chunk), c)
    matrices = np.asarray(kept_basis(11), np.float64)
    np.testing.assert_allclose(value, np.einsum("k,kio->io", c, matrices), atol=2e-6)
    np.testing.assert_allclose(pull(g)[0], np.einsum("kio,io->k", matrices, g), atol=4e-6)


def test_a_mixture_is_the_same_in_and_outside_of_jit():
    c = jax.random.normal(jax.random.key(1), (11,))
    with jax.disable_jit():
        one = mixture(KEY, c, SHAPE)
    assert np.array_equal(one, mixture(KEY, c, SHAPE))


def test_the_numbers_of_a_key_stay_what_they_are():
    """Saved adapters hold a key in place of matrices."""
    drawn = basis(jax.random.wrap_key_data(jnp.asarray([1, 2], jnp.uint32), impl="threefry2x32"), 5, (2, 2))
    pinned = [[0.018822908401489258, -0.582085371017456], [0.4912416934967041, -0.035303354263305664]]
    np.testing.assert_array_equal(drawn, np.asarray(pinned, np.float32))


def test_matrices_are_uniform_and_unrelated():
    drawn = np.asarray(jnp.stack([basis(KEY, index, (40, 20)) for index in range(20)])).reshape(20, -1)
    assert np.all(np.abs(drawn) <= 1) and abs(drawn.var() - 1 / 3) < 0.01
    overlap = np.abs(drawn @ drawn.T / 800 * 3 - np.eye(20))
    assert overlap.max() < 0.2


def test_the_backward_pass_does_not_keep_the_matrices():
    shape, size = (256, 8), 512

    def memory(of):
        gradient = jax.grad(lambda c, key: jnp.sum(jnp.square(of(c, key))))
        compiled = jax.jit(gradient).lower(jnp.ones(size), KEY).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def kept(c, key):
        return jnp.einsum("k,kio->io", c, jax.vmap(lambda index: basis(key, index, shape))(jnp.arange(size)))

    whole = size * shape[0] * shape[1] * 4
    assert memory(lambda c, key: mixture(key, c, shape)) < whole / 8 < whole <= memory(kept)


def test_the_lm_variant_starts_at_the_model_and_moves_b_first():
    adapter, frozen, trainable = start(targets=("q",))
    merged = merge(adapter, toy_params(), frozen, trainable)
    jax.tree.map(np.testing.assert_array_equal, merged, toy_params())

    def loss(trainable):
        params = attach(adapter, toy_params(), frozen, trainable)
        return summed_loss(toy_model(), OBJECTIVE, params, None, jax.tree.map(lambda x: x[0], toy_batch()))[0]

    for grads in jax.jit(jax.grad(loss))(trainable).values():
        assert not grads["mix_a"].any() and np.all(grads["mix_b"] != 0)


def test_the_lm_variant_is_lora_plus_a_basis_within_one_over_the_root_of_its_size():
    adapter, frozen, trainable = start()
    key = jax.random.wrap_key_data(frozen["layers_0/attention/q"]["key"])
    a0 = basis(jax.random.fold_in(key, START), 0, (32, 4)) / np.sqrt(32)
    np.testing.assert_allclose(factors(adapter, frozen, trainable, "layers_0/attention/q").a, a0, rtol=1e-6)
    trainable["layers_0/attention/q"] = {"mix_a": jnp.zeros(12).at[3].set(1.0), "mix_b": jnp.zeros(12).at[5].set(1.0)}
    a, _, b, scale = factors(adapter, frozen, trainable, "layers_0/attention/q")
    for drawn in (a - a0, b):
        assert 0.9 / np.sqrt(12) < np.max(np.abs(drawn)) <= 1 / np.sqrt(12) + 1e-6
    assert scale == 1.0


def test_the_vit_variant_starts_near_the_model():
    adapter, frozen, trainable = start(variant="vit")
    a, _, b, scale = factors(adapter, frozen, trainable, "layers_0/mlp/down")
    assert scale == 0.25 and trainable["layers_0/mlp/down"]["mix_a"].tolist() == pytest.approx([1 / 12] * 12)
    # A mean of 12 numbers that are uniform within (I R)^-1/2, I = 48.
    deviation = (48 * 4 * 3 * 12) ** -0.5
    assert 0.8 < np.std(a) / deviation < 1.2 and 0.8 < np.std(b) / ((4 * 32 * 3 * 12) ** -0.5) < 1.2


def test_layers_of_one_shape_are_made_together_as_they_would_be_alone():
    adapter, frozen, trainable = start()
    mixed = random_mix(trainable)
    attached = select(attach(adapter, toy_params(), frozen, mixed), TARGETS)
    alone = select(attach(adapter._replace(together=False), toy_params(), frozen, mixed), TARGETS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), attached, alone)
    made = jax.make_jaxpr(lambda values: attach(adapter, toy_params(), frozen, values))(mixed)
    assert str(made).count("name=mixture") == 2 * 2, "a and b of two shapes"


def test_layers_draw_apart_and_the_same_whatever_others_are_adapted():
    _, frozen, _ = start()
    keys = {tuple(values["key"].tolist()) for values in frozen.values()}
    assert len(keys) == len(frozen) == 4
    _, fewer, _ = start(targets=("down",))
    assert all(np.array_equal(fewer[path]["key"], frozen[path]["key"]) for path in fewer)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_count_does_not_move_with_the_rank_and_the_rank_holds(rank):
    adapter, frozen, trainable = start(rank=rank)
    assert count(trainable) == 4 * (12 + 12) and count(frozen) == 4 * 2
    whole = correction(adapter, frozen, random_mix(trainable), "layers_0/attention/q")
    assert np.linalg.matrix_rank(whole, tol=1e-4) == rank


def test_the_correction_is_linear_in_b():
    adapter, frozen, trainable = start()
    path = "layers_0/attention/q"
    one, two = random_mix(trainable, 0), random_mix(trainable, 1)
    total = {path: {"mix_a": one[path]["mix_a"], "mix_b": one[path]["mix_b"] + 2 * two[path]["mix_b"]}}
    two[path]["mix_a"] = one[path]["mix_a"]
    parts = correction(adapter, frozen, one, path) + 2 * correction(adapter, frozen, two, path)
    np.testing.assert_allclose(correction(adapter, frozen, total, path), parts, atol=1e-5)


@pytest.mark.parametrize(("variant", "peak"), [("lm", 0.1), ("vit", 1.0)])
def test_training_and_merging(variant, peak):
    adapter, frozen, trainable = start(targets=("down",), variant=variant)
    method, constants = adapter_tuning(adapter), Constants(toy_params(), frozen, None)
    rate = OptimizerConfig(learning_rate=peak, warmup=0, schedule="constant")
    states, metrics, _ = updates(method, constants, trainable, [toy_batch()] * 20, rate)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    values = states[-1].trainable
    attached, merged = (
        toy_model().apply({"params": make(adapter, toy_params(), frozen, values)}, toy_batch().tokens[0]).logits
        for make in (attach, merge)
    )
    np.testing.assert_allclose(attached, merged, atol=1e-5)


@pytest.mark.parametrize("options", [{"rank": 0}, {"bases": 0}])
def test_what_cannot_be(options):
    with pytest.raises(InputError, match="at least 1"):
        NolaConfig(**options)
