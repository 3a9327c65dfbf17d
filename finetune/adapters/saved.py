"""Adapters in folders of their own, beside the model that they belong to.

folder/adapter.json    {"format": 1, "adapter": {...its config...}, "base": {"name": ..., "content": ...}}
folder/values/         orbax checkpoint of its frozen and its trained values

The model itself is not saved: its name and a hash of its content are, and another model is refused.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pydantic
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from finetune.adapters import ADAPTERS, AdapterConfig, make_adapter
from finetune.adapters.adapter import Adapter, Values, merge, rebase
from models.errors import InputError, unknown_name
from models.weights.safetensors import read_json
from models.weights.whole import whole_folder

CONFIG_NAME = "adapter.json"
_FORMAT = 1


class Base(NamedTuple):
    """The model that an adapter belongs to: its name, for people, and its `content_hash`."""

    name: str
    content: str


class SavedAdapter(NamedTuple):
    """An adapter as it was saved: its method, values by module, and the model they belong to."""

    config: AdapterConfig
    adapter: Adapter
    frozen: Values
    trainable: Values
    base: Base


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """Returns u32[2]: sums, modulo 2^32, of the numbers of x as bfloat16, each times two hashes of its place.

    A sum of whole numbers is the same in any order, so it does not depend on how x is spread over devices.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) + jnp.uint32(1)
    places = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)

    def weighted(factor: int) -> jax.Array:
        mixed = (places + jnp.uint32(1)) * jnp.uint32(factor)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        return jnp.sum(bits * (mixed ^ (mixed >> 13) | jnp.uint32(1)), dtype=jnp.uint32)

    return jnp.stack([weighted(0x9E3779B1), weighted(0x85EBCA6B)])


def content_hash(params: Any) -> str:
    """Returns 64 hexadecimal digits that tell models apart by their parameters' names, shapes and values.

    Values count as bfloat16, so that a model is the same whether it was loaded in that dtype or in float32.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    digest = hashlib.sha256()
    for (path, leaf), pair in zip(leaves, sums, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{pair.tolist()}".encode())
    return digest.hexdigest()


def base_of(name: str | Path, params: Any) -> Base:
    """Returns what identifies a model: a registry name as it is, a file or folder by its own name; and its content."""
    return Base(Path(name).name, content_hash(params))


def save_adapter(folder: Path | str, config: AdapterConfig, frozen: Values, trainable: Values, base: Base) -> None:
    """Writes an adapter's folder; it appears complete or not at all, and replaces an adapter that stands there.

    Every process of a run must call this; the first one writes.

    Args:
        folder: where to.
        config: the adapter's method and settings.
        frozen: its frozen values, {path: {name: array}}.
        trainable: its trained values, after `Adapter.finish`.
        base: the model they belong to (`base_of`).

    Raises:
        InputError: something else stands there, the disk is full, or the folder cannot be written.
    """
    tree = {name: x for name, x in (("frozen", _nested(frozen)), ("trainable", _nested(trainable))) if x}
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    if jax.process_index() != 0:
        return
    about = {"format": _FORMAT, "adapter": dataclasses.asdict(config), "base": base._asdict(), "empty": not tree}
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    with whole_folder(folder, mark=CONFIG_NAME) as staging:
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
                if tree:  # an adapter may have given up all that it had (SoRA)
                    checkpointer.save(staging.absolute() / "values", tree)
        except ValueError as error:  # how orbax's writer reports a failed write
            raise InputError(f"cannot write {folder}: {error}") from error
        (staging / CONFIG_NAME).write_text(json.dumps(about, indent=1), encoding="utf-8")


def load_adapter(folder: Path | str, base: Base) -> SavedAdapter:
    """Reads an adapter's folder.

    Args:
        folder: what `save_adapter` wrote.
        base: the model it is for (`base_of`).

    Raises:
        InputError: no adapter there, a damaged one, one of a newer version, or one of another model.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder} holds no adapter: there is no {CONFIG_NAME} in it")
    about = read_json(folder / CONFIG_NAME)
    if about.get("format") != _FORMAT:
        raise InputError(f"{folder / CONFIG_NAME} has format {about.get('format')!r}; this version reads {_FORMAT}")
    config, trained_on = _read_about(folder, about)
    if trained_on.content != base.content:
        raise InputError(
            f"the adapter in {folder} belongs to {trained_on.name!r} (content {trained_on.content[:12]}), not to "
            f"{base.name!r} (content {base.content[:12]}): load that model, or train an adapter for this one"
        )
    values = {} if about.get("empty") else _read_values(folder)
    trainable = _flat(values.get("trainable", {}))
    frozen = {path: {} for path in trainable} | _flat(values.get("frozen", {}))
    return SavedAdapter(config, make_adapter(config), frozen, trainable, trained_on)


def with_adapter(folder: Path | str, name: str | Path, params: Any) -> Any:
    """Returns a model's parameters with a saved adapter merged into them, dense.

    Args:
        folder: the adapter's.
        name: the model's name or path.
        params: its parameters.

    Raises:
        InputError: see `load_adapter`.
    """
    saved = load_adapter(folder, base_of(name, params))
    base = rebase(saved.adapter, params, saved.frozen)
    return merge(saved.adapter, base, saved.frozen, saved.trainable)


def _nested(values: Values) -> dict[str, Any]:
    """Returns {"layers_0": {"attention": {"q": {"a": ...}}}}: what a checkpoint's paths can be made of."""
    return unflatten_dict({f"{path}/{name}": x for path, named in values.items() for name, x in named.items()}, sep="/")


def _flat(nested: dict[str, Any]) -> Values:
    values: Values = {}
    for path, x in flatten_dict(nested, sep="/").items():
        module, _, name = path.rpartition("/")
        values.setdefault(module, {})[name] = x
    return values


def _read_about(folder: Path, about: dict[str, Any]) -> tuple[AdapterConfig, Base]:
    given = about.get("adapter")
    if not isinstance(given, dict) or given.get("type") not in ADAPTERS:
        raise unknown_name("adapter", given.get("type") if isinstance(given, dict) else given, ADAPTERS)
    try:
        config = pydantic.TypeAdapter(ADAPTERS[given["type"]][0]).validate_python(given)
        return config, pydantic.TypeAdapter(Base).validate_python(about.get("base"))
    except pydantic.ValidationError as error:
        raise InputError(f"{folder / CONFIG_NAME} is damaged: {error.errors()[0]['msg']}") from error


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder.absolute() / "values"
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), stored)
            return checkpointer.restore(path, target)
    except Exception as error:  # orbax raises plain Exception for data it cannot read
        raise InputError(f"{path} is not a readable checkpoint (incomplete or damaged? {error})") from error
