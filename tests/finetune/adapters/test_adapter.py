"""The functions that all adapters share: choosing layers, keys of layers, replaced kernels, adapters that move W."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.adapters.adapter import (
    LINEAR,
    Adapter,
    Factors,
    attach,
    check_rank,
    count,
    merge,
    module_key,
    rebase,
    replace_kernels,
    select,
)
from models.errors import InputError
from models.kernels import LowRank
from tests.support.toy_training import toy_params


def test_layers_are_chosen_by_name_or_by_path():
    params = toy_params()
    every = select(params, LINEAR)
    assert len(every) == 14 and "unembedding" not in every
    assert list(select(params, ("v", "layers_1/mlp/*"))) == [
        "layers_0/attention/v",
        "layers_1/attention/v",
        "layers_1/mlp/down",
        "layers_1/mlp/gate",
        "layers_1/mlp/up",
    ]
    assert list(select(params, ("q", "layers_0/attention/q"))) == ["layers_0/attention/q", "layers_1/attention/q"]
    assert list(select(params, ("unembedding",))) == ["unembedding"]
    np.testing.assert_array_equal(every["layers_1/mlp/up"], params["layers_1"]["mlp"]["up"]["kernel"])


def test_a_target_that_matches_nothing_is_refused_with_near_matches():
    with pytest.raises(InputError, match=r"target 'gates' matches no linear layer. Near matches: gate\b"):
        select(toy_params(), ("q", "gates"))
    with pytest.raises(InputError, match=r"Near matches: .*layers_0/attention/q"):
        select(toy_params(), ("layers_0/atention/q",))
    with pytest.raises(InputError, match=r"matches no linear layer. Name layers \(down, gate, k, .*'layers_0/att"):
        select(toy_params(), ("norm/@",))


def test_a_layer_has_one_key_for_ever():
    """A stored number: bases that are made again from keys depend on it."""
    key = module_key(jax.random.key(7), "layers_0/attention/q")
    assert (
        jax.random.key_data(key).tolist()
        == jax.random.key_data(jax.random.fold_in(jax.random.key(7), 985386669)).tolist()
    ), "the key of a layer changed: saved adapters that regenerate their bases can no longer be read"
    other = module_key(jax.random.key(7), "layers_0/attention/k")
    assert (jax.random.key_data(key) != jax.random.key_data(other)).any()


def test_replaced_kernels_leave_the_rest_shared():
    params = toy_params()
    new = jnp.zeros((32, 16), jnp.float32)
    replaced = replace_kernels(params, {"layers_1/attention/v": new})
    assert replaced["layers_1"]["attention"]["v"]["kernel"] is new
    assert params["layers_1"]["attention"]["v"]["kernel"] is not new, "the caller's tree was changed"
    assert replaced["layers_0"]["mlp"]["up"]["kernel"] is params["layers_0"]["mlp"]["up"]["kernel"]
    assert jax.tree.structure(replaced) == jax.tree.structure(params)


def test_an_adapter_may_start_from_a_residual():
    """base = W - 2 a b, correction = 2 a core b with core = 1: W again; the model's own parameters stay."""
    adapter = Adapter(
        init=lambda key, kernels, gradients: ({}, {}),
        factors=lambda frozen, trainable, shape: Factors(frozen["a"], trainable["core"], frozen["b"], 2.0),
        rebase=lambda kernel, frozen: kernel - 2 * frozen["a"] @ frozen["b"],
    )
    params, path = toy_params(), "layers_0/attention/v"
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((32, 3), (3, 16)))
    frozen, trainable = {path: {"a": a, "b": b}}, {path: {"core": jnp.ones((3,), jnp.float32)}}
    base = rebase(adapter, params, frozen)
    kernel, own = (tree["layers_0"]["attention"]["v"]["kernel"] for tree in (base, params))
    np.testing.assert_allclose(kernel, own - 2 * a @ b, atol=1e-5)
    attached = attach(adapter, base, frozen, trainable)["layers_0"]["attention"]["v"]["kernel"]
    assert isinstance(attached, LowRank) and attached.scale == 2.0
    merged = merge(adapter, base, frozen, trainable)
    np.testing.assert_allclose(merged["layers_0"]["attention"]["v"]["kernel"], own, atol=1e-5)
    assert merged["layers_1"]["attention"]["v"]["kernel"] is params["layers_1"]["attention"]["v"]["kernel"]


def test_merging_into_bfloat16_rounds_once():
    """A correction of half a unit in the last place is added in float32: some entries move, others do not."""
    adapter = Adapter(
        init=lambda key, kernels, gradients: ({}, {}),
        factors=lambda frozen, trainable, shape: Factors(trainable["a"], None, trainable["b"], 1.0),
    )
    base = {"q": {"kernel": jnp.asarray([[1.0, 2.0], [256.0, 1.0]], jnp.bfloat16)}}
    trainable = {"q": {"a": jnp.ones((2, 1), jnp.float32), "b": jnp.full((1, 2), 0.01, jnp.float32)}}
    merged = merge(adapter, base, {"q": {}}, trainable)["q"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    exact = np.asarray(base["q"]["kernel"], np.float32) + 0.01
    np.testing.assert_array_equal(merged, jnp.asarray(exact).astype(jnp.bfloat16))


def test_count():
    assert count({"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros(()), "d": None}}) == 13


def test_check_rank():
    kernels = {"q": jnp.zeros((8, 4)), "k": jnp.zeros((4, 3))}
    check_rank(3, kernels)
    with pytest.raises(InputError, match="rank 4 is larger than the smaller side of k, 4 by 3; take a rank of at most"):
        check_rank(4, kernels)
