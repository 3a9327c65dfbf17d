import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from models.decoder import Decoder
from models.errors import InputError
from models.families import FAMILIES
from models.kernels import LowRank
from models.sharding import (
    MeshConfig,
    abstract,
    abstract_mesh,
    build,
    make_mesh,
    mesh_of,
    mesh_shape,
    num_row_shards,
    partition,
    place,
    place_rows,
    replicate,
    shardings,
)
from models.weights.load import load_model
from models.weights.orbax import save_model
from tests.conftest import tiny_config
from tests.support.tiny_models import CONFIGS

MESH = abstract_mesh(MeshConfig(2, 2, 2))


def test_the_rest_of_the_devices_goes_to_the_axis_with_minus_one():
    assert mesh_shape(MeshConfig(), 8) == (8, 1, 1, 1)
    assert mesh_shape(MeshConfig(2, -1, 2), 8) == (2, 2, 1, 2)
    assert mesh_shape(MeshConfig(2, 1, 1, -1), 8) == (2, 1, 4, 1)
    assert num_row_shards(abstract_mesh(MeshConfig(3, 4, 5))) == 12
    assert num_row_shards(abstract_mesh(MeshConfig(3, 1, 5, 2))) == 6


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            MeshConfig(2, 2, 1),
            8,
            "data 2 x fsdp 2 x expert 1 x tensor 1 does not fit 8 devices: .* product is 8",
        ),
        (MeshConfig(-1, 3, 1), 8, "data -1 x fsdp 3 x expert 1 x tensor 1 does not fit 8 devices"),
        (MeshConfig(-1, 4, 1), 2, "does not fit 2 devices"),
        (MeshConfig(2, 1, 1), 1, "does not fit 1 device:"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, devices, message):
    with pytest.raises(InputError, match=message):
        mesh_shape(config, devices)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (-2, 1, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes):
    with pytest.raises(InputError, match=f"or -1 along one of them.*got {sizes[0]}, {sizes[1]}"):
        MeshConfig(*sizes)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers_0/attention/q/kernel", (8, 8), P("fsdp", "tensor")),
        ("layers_0/attention/o/kernel", (8, 8), P("tensor", "fsdp")),
        ("layers_11/mlp/down/kernel", (8, 8), P("tensor", "fsdp")),
        ("opt_state/1/0/mu/layers_0/mlp/up/kernel", (8, 8), P("fsdp", "tensor")),
        ("layers_0/attention/q/bias", (8,), P("tensor")),
        ("layers_0/attention/o/bias", (8,), P()),
        ("layers_0/attention_norm/scale", (8,), P()),
        ("embedding/embedding", (8, 64), P(None, ("tensor", "fsdp"))),
        ("embedding/embedding", (8, 62), P(None, "tensor")),
        ("embedding/embedding", (8, 61), P()),
        ("unembedding/kernel", (8, 64), P(None, ("tensor", "fsdp"))),
        ("positions/embedding", (8, 64), P("fsdp")),
        ("layers_0/mlp/gate/a", (8, 4), P()),
        ("layers_0/mlp/gate/b", (4, 8), P(None, "tensor")),
        ("layers_0/mlp/down/a", (8, 4), P("tensor")),
        ("layers_0/mlp/down/kernel/b", (4, 8), P()),
        ("layers_0/mlp/gate/core", (4, 4), P()),
        ("layers_0/mlp/experts_up", (4, 8, 8), P(None, "fsdp", "tensor")),
        ("layers_0/mlp/shared/up/kernel", (8, 8), P("fsdp", "tensor")),
        ("layers_0/mlp/aggregate/kernel", (8, 8), P()),
        ("layers_0/attention/q/kernel", (8, 8, 8), P()),
    ],
)
def test_rules(path, shape, spec):
    assert partition(path, shape, MESH) == spec


@pytest.mark.parametrize("name", ["llama", "llama_bias_tied", "gemma3", "gpt2", "mixtral"])
def test_every_matrix_of_every_family_has_a_rule(name):
    config = FAMILIES[CONFIGS[name]["model_type"].removesuffix("_text")].read_config(CONFIGS[name])
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    for path, shape in flatten_dict(shapes, sep="/").items():
        if shape.ndim > 1 and "router" not in path:  # 61 words are a prime number of them
            even = tuple(64 if size == 61 else size for size in shape.shape)
            assert partition(path, even, MESH) != P(), path


def test_the_state_of_an_optimiser_follows_the_values():
    values = jax.eval_shape(Decoder(tiny_config()).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    state = jax.eval_shape(optax.adamw(1e-3).init, values)
    wanted = jax.tree.leaves(shardings(values, MESH))
    assert jax.tree.leaves(shardings(state[0].mu, MESH)) == jax.tree.leaves(shardings(state[0].nu, MESH)) == wanted
    assert jax.tree.leaves(shardings(state, MESH))[1 : 1 + len(wanted)] == wanted


def test_an_attached_kernel_is_split_like_the_plain_one():
    kernel = LowRank(jnp.ones((8, 8)), jnp.ones((8, 2)), jnp.ones((2, 2)), jnp.ones((2, 8)))
    found = shardings({"attention": {"o": {"kernel": kernel}}}, MESH)["attention"]["o"]["kernel"]
    assert (found.base.spec, found.a.spec) == (P("tensor", "fsdp"), P("tensor"))
    assert (found.core.spec, found.b.spec) == (P(), P())


@pytest.fixture
def two() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1, 1, 2))


def test_values_are_made_and_placed_where_they_belong(two):
    model = Decoder(tiny_config())
    init = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]  # noqa: E731
    alone = jax.jit(init)(jax.random.key(0))
    for params in (build(init, jax.random.key(0), mesh=two), place(alone, two)):
        jax.tree.map(np.testing.assert_array_equal, params, alone)
        q = params["layers_0"]["attention"]["q"]["kernel"]
        assert {shard.data.shape for shard in q.addressable_shards} == {(32, 16)}
        assert params["final_norm"]["scale"].sharding.is_fully_replicated
    assert mesh_of(params) == two and mesh_of(alone) is None
    whole = replicate(params, two)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))


def test_random_keys_can_be_placed(two):
    key = jax.random.key(3)
    placed = place({"basis": key, "more": jax.random.split(key, 2)}, two)
    assert placed["basis"].sharding.mesh == two
    assert jax.random.bits(placed["basis"]) == jax.random.bits(key)


def test_rows_that_do_not_divide_are_not_split():
    rows = make_mesh(MeshConfig(2, 1, 1))
    even, odd = place_rows((np.arange(4), np.arange(3)), rows)
    assert [shard.data.tolist() for shard in even.addressable_shards] == [[0, 1], [2, 3]]
    assert odd.sharding.is_fully_replicated


def test_a_saved_model_is_loaded_onto_a_mesh(tmp_path, two):
    model = Decoder(tiny_config())
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_model(tmp_path / "model", model, params)
    loaded = load_model(tmp_path / "model", mesh=two).params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    wanted = abstract(params, two)
    assert jax.tree.all(jax.tree.map(lambda leaf, shape: leaf.sharding == shape.sharding, loaded, wanted))
