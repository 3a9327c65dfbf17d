"""Model folders of our own: the parameters as an orbax checkpoint, the config as JSON, the tokenizer beside them.

folder/fleetlm.json      {"format": 1, "config": {...}}
folder/params/           orbax checkpoint of the parameter tree
folder/tokenizer.json    (and tokenizer_config.json) when there is a tokenizer
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from models.config import ModelConfig, config_from_dict, config_to_dict
from models.encoder_decoder import Network, network
from models.errors import InputError
from models.sharding import abstract
from models.weights.assemble import parameter_shapes
from models.weights.safetensors import read_json
from models.weights.tokenizer import Tokenizer
from models.weights.whole import whole_folder

CONFIG_NAME = "fleetlm.json"
_FORMAT = 1


def save_model(
    folder: Path | str, model: Network, params: Any, tokenizer: Tokenizer | None = None, *, replace: bool = False
) -> None:
    """Writes a model folder that `load_model` reads; dtypes are kept.

    The folder appears complete or not at all. Every process that holds a part of the parameters must call this; the
    first one gathers them and writes.

    Args:
        folder: where to.
        model: the network.
        params: its parameters.
        tokenizer: to be put beside them.
        replace: whether a model folder that stands there gives way, once the new one is whole.

    Raises:
        InputError: the folder exists already, or cannot be written (a full disk).
    """
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() != 0:
        return
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    with whole_folder(folder, mark=CONFIG_NAME if replace else None) as staging:
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
                checkpointer.save(staging.absolute() / "params", params)
        except ValueError as error:  # how orbax's writer reports a failed write
            raise InputError(f"cannot write {folder}: {error}") from error
        values = {"format": _FORMAT, "config": config_to_dict(model.config)}
        (staging / CONFIG_NAME).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(staging)


def read_config(folder: Path) -> ModelConfig:
    """Returns the config of a model folder; raises InputError when it is of a newer format or damaged."""
    values = read_json(folder / CONFIG_NAME)
    if values.get("format") != _FORMAT:
        raise InputError(f"{folder / CONFIG_NAME} has format {values.get('format')!r}; this version reads {_FORMAT}")
    return config_from_dict(values.get("config", {}))


def load_parameters(
    folder: Path, config: ModelConfig, dtype: jnp.dtype | None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Returns the parameter tree of a model folder, in `dtype` (None: as stored), spread over a mesh if given."""
    path = folder.absolute() / "params"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = flatten_dict(checkpointer.metadata(path).item_metadata.tree, sep="/")
            wanted = parameter_shapes(network(config))
            if {k: tuple(v.shape) for k, v in stored.items()} != {k: v.shape for k, v in wanted.items()}:
                raise InputError(f"{folder}: the parameters do not fit the config in {CONFIG_NAME}")
            target = {k: jax.ShapeDtypeStruct(v.shape, dtype or stored[k].dtype) for k, v in wanted.items()}
            return checkpointer.restore(path, abstract(unflatten_dict(target, sep="/"), mesh))
    except InputError:
        raise
    except Exception as error:  # orbax raises plain Exception for data it cannot read
        raise InputError(f"{path} is not a readable checkpoint (incomplete or damaged? {error})") from error
