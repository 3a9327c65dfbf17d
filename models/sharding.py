"""Where arrays live on many devices: one mesh, one table of rules, and functions that make arrays in place.

The mesh has four axes. Rows of a batch are spread over `data`, `fsdp` and `expert`, parameters over `fsdp` and
`tensor`, the experts of a mixture over `expert`; the optimiser's state follows its values. A rule names axes for each
dimension of the arrays whose path it matches; an array without a rule, and a dimension that its axis does not divide,
is not split (but experts must divide). XLA's partitioner does the rest (axis type Auto): no layer knows of devices, and
what is computed does not depend on the mesh.

An adapter's factors are split where their kernel is over `tensor`, but not over `fsdp`: they are small, and gathering
them doubles the number of collectives of a step.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.errors import InputError

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")  # the axes that rows of a batch are spread over

_SPLIT_OUT = r"(^|/)(q|k|v|gate|up)"  # layers whose outputs are split over `tensor`
_SPLIT_IN = r"(^|/)(o|down)"  # layers that take these as inputs
_KERNEL = r"(/kernel(/base)*)"
RULES: tuple[tuple[str, P], ...] = (  # the end of a path, axes for each dimension; the first that matches counts
    (r"(^|/)experts_(up|gate)", P("expert", "fsdp", "tensor")),
    (r"(^|/)experts_down", P("expert", "tensor", "fsdp")),
    (rf"{_SPLIT_OUT}{_KERNEL}", P("fsdp", "tensor")),
    (rf"{_SPLIT_OUT}{_KERNEL}?/b", P(None, "tensor")),
    (rf"{_SPLIT_OUT}/bias", P("tensor")),
    (rf"{_SPLIT_IN}{_KERNEL}", P("tensor", "fsdp")),
    (rf"{_SPLIT_IN}{_KERNEL}?/a", P("tensor", None)),
    (r"(^|/)(embedding/embedding|unembedding/kernel)", P(None, ("tensor", "fsdp"))),  # XLA cannot look up other splits
    (r"(^|/)positions/embedding", P("fsdp", None)),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis; -1, for one of them: as many as the others leave.

    Attributes:
        data: rows of a batch are spread over it; every device along it holds the same parameters.
        fsdp: rows and parameters are spread over it; a layer's parameters are gathered when it runs.
        tensor: parameters are spread over it, and each device computes with its share of heads and features.
        expert: rows and the experts of a mixture are spread over it; every device along it holds the same of all other
            parameters.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(
                f"the mesh needs at least 1 device along each of {', '.join(AXES)}, or -1 along one of them for all "
                f"that are left; got {', '.join(map(str, sizes))}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size along each of `AXES` as given."""
        return tuple(getattr(self, axis) for axis in AXES)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the size along each of `AXES`, without -1; raises InputError where their product is not `num_devices`."""
    named = math.prod(size for size in config.sizes if size != -1)
    shape = tuple(num_devices // named if size == -1 else size for size in config.sizes)
    if math.prod(shape) != num_devices or 0 in shape:
        words = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, config.sizes, strict=True))
        raise InputError(
            f"the mesh {words} does not fit {num_devices} device{'s' if num_devices > 1 else ''}: choose sizes whose "
            f"product is {num_devices}, or -1 for one of them"
        )
    return shape


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over these devices (None: all of all processes); raises InputError where it does not fit."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(mesh_shape(config, len(devices)), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Returns a mesh without devices, for a machine that is not here; -1 stands for the devices that are."""
    named = math.prod(size for size in config.sizes if size != -1)
    shape = mesh_shape(config, jax.device_count() if -1 in config.sizes else named)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Returns how an array is split, by the first rule for its path and number of dimensions."""
    for pattern, axes in RULES:
        if len(axes) == len(shape) and re.search(f"{pattern}$", path):
            split = [_dividing(wanted, size, mesh) for wanted, size in zip(axes, shape, strict=True)]
            while split and split[-1] is None:  # as XLA writes the same thing
                split.pop()
            return P(*split)
    return P()


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the tree with a `NamedSharding` for each array (or shape): parameters, adapters, a whole train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh)), tree
    )


def path_name(path: Sequence[Any]) -> str:
    """Returns a tree path as "layers_0/attention/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def abstract(tree: Any, mesh: Mesh | None) -> Any:
    """Returns the shapes of a tree with their shardings: what a checkpoint is to be restored into.

    Without a mesh, all of it goes to the default device.
    """
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda leaf: alone, tree) if mesh is None else shardings(tree, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, where
    )


def build(function: Callable[..., Any], *args: Any, mesh: Mesh) -> Any:
    """Returns function(*args), computed where its results belong: no device ever holds more than its share of them."""
    return jax.jit(function, out_shardings=shardings(jax.eval_shape(function, *args), mesh))(*args)


def place(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree of arrays spread over the mesh; every process passes the same arrays, whole or spread already."""
    return jax.tree.map(_place, tree, shardings(tree, mesh))


def place_leaf(path: str, value: Any, mesh: Mesh) -> jax.Array:
    """Returns one array of a tree, by its path, spread over the mesh."""
    return _place(value, NamedSharding(mesh, partition(path, value.shape, mesh)))


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays [B, ...] spread by rows; every process passes the same; rows that do not divide are not split."""
    count = num_row_shards(mesh)
    return jax.tree.map(
        lambda leaf: _place(leaf, NamedSharding(mesh, P(ROWS) if leaf.shape[0] % count == 0 else P())), tree
    )


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns arrays of the mesh whole on every device, so that every process can read them."""
    return jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(tree)


def keep_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Says inside jit that x [B, ...] is spread by rows, and by nothing else; without a mesh it is x itself."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS)))


def keep_split(tree: Any, mesh: Mesh | None) -> Any:
    """Says inside jit that arrays are split by the rules; without a mesh it is the tree itself."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of `make_mesh` that the arrays of a tree lie on, or None where they lie on no such mesh."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == AXES:
            return sharding.mesh
    return None


def _same(tree: Any) -> Any:
    return tree


def _dividing(
    wanted: str | tuple[str, ...] | None, size: int, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    """Returns those of the wanted axes that split a dimension evenly, as a `PartitionSpec` writes them."""
    kept: list[str] = []
    if wanted == "expert" and size % mesh.shape[wanted]:
        raise InputError(
            f"{size} experts cannot be spread evenly over {mesh.shape[wanted]} devices: make the mesh's size along "
            f"'expert' one that divides {size}"
        )
    for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
        if mesh.shape[axis] > 1 and size % math.prod(mesh.shape[name] for name in (*kept, axis)) == 0:
            kept.append(axis)
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def _place(value: Any, sharding: NamedSharding) -> jax.Array:
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(value), sharding), impl=jax.random.key_impl(value))
    if isinstance(value, jax.Array) and not value.is_fully_addressable:  # of all processes already
        return jax.jit(_same, out_shardings=sharding)(value)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
