"""What a training run keeps in memory, counted without any: numbers, how arrays are split, bytes on each device.

All of it follows from shapes, so the devices of the mesh need not be here. What a step makes and drops again
(activations, logits) comes on top: it depends on the batch, and on how XLA schedules the step.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from finetune.adapters.adapter import Adapter, Values, select
from models.encoder_decoder import Network
from models.errors import InputError
from models.sharding import AXES, num_row_shards, partition, path_name
from models.weights.assemble import parameter_shapes


class Array(NamedTuple):
    """Arrays that differ in their layer alone.

    Attributes:
        path: with * for the layer.
        shape: of one.
        dtype: of one.
        axes: the mesh axes of each dimension ("tensor", or "tensor+fsdp"), None where it is not split.
        copies: how many layers have one.
        device_bytes: what all of them take on each device.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    copies: int
    device_bytes: int


class Part(NamedTuple):
    """One of the trees that training keeps: its numbers, its bytes in all and on each device, and its arrays."""

    name: str
    numbers: int
    bytes: int
    device_bytes: int
    arrays: tuple[Array, ...]


class DryRun(NamedTuple):
    """What a run keeps.

    Attributes:
        mesh: devices along each axis.
        row_shards: into how many parts the rows of a batch are split.
        parameters: numbers in the model.
        trained: numbers that are trained.
        optimizer: numbers in the optimiser's state.
        parts: all that is kept.
    """

    mesh: dict[str, int]
    row_shards: int
    parameters: int
    trained: int
    optimizer: int
    parts: tuple[Part, ...]

    @property
    def device_bytes(self) -> int:
        """Bytes on each device, all parts together."""
        return sum(part.device_bytes for part in self.parts)


def model_shapes(model: Network, dtype: str = "float32") -> Any:
    """Returns the shapes of a model's parameters, as they are kept in `dtype`."""
    shapes = parameter_shapes(model)
    return unflatten_dict({path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in shapes.items()}, sep="/")


def adapter_shapes(adapter: Adapter, params: Any, targets: tuple[str, ...]) -> tuple[Values, Values]:
    """Returns the shapes of (frozen, trainable) of an adapter on a model's parameters, themselves shapes or arrays.

    Raises:
        InputError: targets that name no layer, a rank that a layer cannot have, or shapes that follow from the weights.
    """
    kernels = select(params, targets)
    try:
        return jax.eval_shape(adapter.init, jax.random.key(0), kernels, kernels if adapter.needs_gradients else None)
    except jax.errors.ConcretizationTypeError as error:
        raise InputError(
            "how many numbers each layer trains with this adapter follows from its weights, which are not read here; "
            "count an adapter whose ranks are given (for lamda_plus_plus: lamda of the same rank)"
        ) from error


def dry_run(
    base: Any,
    frozen: Any,
    trainable: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    objective: Any = None,
) -> DryRun:
    """Counts what a run keeps.

    Args:
        base: the parameters that are not trained; empty where all are.
        frozen: the method's own constants.
        trainable: the trained values; this and the other two are trees of shapes or arrays.
        optimizer: of the run.
        mesh: with or without devices.
        objective: what the objective reads (a teacher, a table of costs); None: nothing.
    """
    state = jax.eval_shape(optimizer.init, trainable)
    trees = {
        "parameters, frozen": base,
        "method, frozen": frozen,
        **({} if objective is None else {"objective, frozen": objective}),
        "trained values": trainable,
        "their gradients": trainable,
        "optimiser state": state,
    }
    parts = tuple(_part(name, tree, mesh) for name, tree in trees.items())
    numbers = {part.name: part.numbers for part in parts}
    trained = numbers["trained values"]
    return DryRun(
        mesh={axis: mesh.shape[axis] for axis in AXES},
        row_shards=num_row_shards(mesh),
        parameters=numbers["parameters, frozen"] or trained,
        trained=trained,
        optimizer=numbers["optimiser state"],
        parts=parts,
    )


def render(report: DryRun) -> str:
    """Returns a report as text: totals, parts, and the arrays of parameters and trained values."""
    words = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    devices = math.prod(report.mesh.values())
    lines = [
        f"mesh: {words} = {devices} device{'s' if devices > 1 else ''}; rows of a batch in {report.row_shards} parts",
        f"parameters {report.parameters:,}; trained {report.trained:,} "
        f"({report.trained / report.parameters:.2%}); optimiser state {report.optimizer:,} numbers",
        "",
        *_table(
            ("kept", "numbers", "MiB in all", "MiB per device"),
            [
                *((p.name, f"{p.numbers:,}", _mib(p.bytes), _mib(p.device_bytes)) for p in report.parts),
                ("all of it", "", _mib(sum(p.bytes for p in report.parts)), _mib(report.device_bytes)),
            ],
        ),
        "Activations and logits come on top.",
    ]
    for part in report.parts[:3]:
        if part.arrays:
            lines += ["", *_table((part.name, "shape", "dtype", "split over", "MiB per device"), _rows(part))]
    return "\n".join(lines)


def _part(name: str, tree: Any, mesh: Mesh | AbstractMesh) -> Part:
    groups: dict[tuple, list[int]] = {}
    numbers = whole = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path_name(path)
        spec = partition(path, leaf.shape, mesh)
        each = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)) * leaf.dtype.itemsize
        names = tuple("+".join(axis) if isinstance(axis, tuple) else axis for axis in spec)
        axes = names + (None,) * (len(leaf.shape) - len(names))
        key = re.sub(r"layers_\d+", "layers_*", path), tuple(leaf.shape), str(leaf.dtype), axes
        groups.setdefault(key, []).append(each)
        numbers += math.prod(leaf.shape)
        whole += math.prod(leaf.shape) * leaf.dtype.itemsize
    arrays = tuple(Array(*key, copies=len(sizes), device_bytes=sum(sizes)) for key, sizes in groups.items())
    return Part(name, numbers, whole, sum(array.device_bytes for array in arrays), arrays)


def _rows(part: Part) -> list[tuple[str, ...]]:
    return [
        (
            f"{array.path}{f' ({array.copies})' if array.copies > 1 else ''}",
            " x ".join(map(str, array.shape)) or "1",
            array.dtype,
            ", ".join(axis or "-" for axis in array.axes) if any(array.axes) else "nothing",
            _mib(array.device_bytes),
        )
        for array in part.arrays
    ]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Returns aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (head, *rows)
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f}"
