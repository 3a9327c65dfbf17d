"""Fills a model's parameters from a checkpoint's tensors by a family's name table.

Every source tensor and every parameter is used exactly once; what is left over on either side is an error that lists
both.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from models.config import ModelConfig
from models.encoder_decoder import Network, init_params, network
from models.errors import InputError
from models.families.common import PREFIXES, Row
from models.sharding import place_leaf

_WORKERS = 2


def parameter_shapes(model: Network) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {"layers_0/attention/q/kernel": shape, ...} for every parameter of the model, without making any."""
    return flatten_dict(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)), sep="/")


def assemble(
    config: ModelConfig,
    table: Mapping[str, Row],
    names: Sequence[str],
    read: Callable[[str], np.ndarray],
    *,
    ignored: Sequence[str],
    dtype: jnp.dtype | None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Returns the parameter tree of `network(config)`.

    Args:
        config: the model.
        table: the family's name table for this kind of checkpoint.
        names: the checkpoint's tensors.
        read: returns one tensor by its name in `names`.
        ignored: regular expressions of tensors that hold no parameter.
        dtype: what the parameters are stored in; None keeps each as it is read.
        mesh: of devices that the parameters are spread over; None: the default device.

    Raises:
        InputError: a parameter without a tensor, a tensor without a parameter, or a shape that does not fit.
    """
    shapes = parameter_shapes(network(config))
    by_source = {_strip_prefix(name): name for name in names}
    wanted = {path: _by_present_name(row_of(path, table), by_source) for path in shapes}
    sources = {path: sources_of(row, shapes[path].shape) for path, row in wanted.items()}
    _check_names(config, table, by_source, sources, ignored)

    def load_one(path: str, source: str, shape: tuple[int, ...]) -> np.ndarray:
        layer = re.match(r"layers_(\d+)/", path)
        attention = config.blocks[int(layer[1])].attention if layer else None
        stored = read(by_source[source])
        try:
            values = wanted[path].convert(stored, attention)
        except ValueError as error:
            raise InputError(
                f"tensor {by_source[source]!r} of shape {stored.shape} does not fit {path} of this config: {error}"
            ) from error
        if values.shape != shape:
            raise InputError(
                f"tensor {by_source[source]!r} gives {path} the shape {values.shape}, but the config says {shape}"
            )
        return np.ascontiguousarray(values, dtype=dtype)

    def load(path: str) -> jax.Array:
        names, shape = sources[path], shapes[path].shape
        if names == [wanted[path].source]:
            values = load_one(path, names[0], shape)
        else:
            values = np.stack([load_one(path, name, shape[1:]) for name in names])
        return jnp.asarray(values) if mesh is None else place_leaf(path, values, mesh)

    with ThreadPoolExecutor(_WORKERS) as pool:
        arrays = dict(zip(shapes, pool.map(load, shapes), strict=True))
    return unflatten_dict(arrays, sep="/")


def _check_names(
    config: ModelConfig,
    table: Mapping[str, Row],
    by_source: Mapping[str, str],
    sources: Mapping[str, Sequence[str]],
    ignored: Sequence[str],
) -> None:
    """Raises InputError where parameters and tensors (`by_source`: their names, without and with prefix) do not fit."""
    used = {name for names in sources.values() for name in names}
    missing = [
        path if len(names) < 2 else f"{path} (of {name})"
        for path, names in sources.items()
        for name in names or [""]
        if name not in by_source
    ]
    unused = [
        name
        for source, name in by_source.items()
        if source not in used and not any(re.search(p, name) or re.search(p, source) for p in ignored)
    ]
    if config.tied_embeddings:  # some savers write the tied unembedding a second time
        second = {row.source for path, row in table.items() if path.endswith("unembedding/kernel")}
        unused = [name for name in unused if _strip_prefix(name) not in second]
    if missing or unused:
        raise InputError(
            f"the checkpoint does not fit a {config.family} model of this config: "
            f"parameters without a tensor: {_some(missing)}; tensors without a parameter: {_some(unused)}"
        )


def _strip_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def row_of(path: str, table: Mapping[str, Row]) -> Row | None:
    """Returns a parameter's row of a name table, with its layer's number in the source; None where there is none."""
    layer = re.search(r"\blayers_(\d+)/", path)
    if not layer:
        return table.get(path)
    row = table.get(path.replace(layer[0], "layers_{i}/", 1))
    return row and row._replace(source=row.source.replace("{i}", layer[1]))


def _by_present_name(row: Row | None, names: Mapping[str, str]) -> Row | None:
    """Returns a row whose source has one name, the first that there is (or else the first)."""
    if row is None or "|" not in row.source:
        return row
    given = row.source.split("|")
    return row._replace(source=next((name for name in given if name in names), given[0]))


def sources_of(row: Row | None, shape: tuple[int, ...]) -> list[str]:
    """Returns the tensors that a parameter of this shape is made of: with `{e}` in its row one for each expert."""
    if row is None:
        return []
    return [row.source.replace("{e}", str(e)) for e in range(shape[0])] if "{e}" in row.source else [row.source]


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
