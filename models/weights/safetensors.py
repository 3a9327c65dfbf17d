"""Hugging Face model folders: config.json with one or several safetensors files. Stored dtypes (bfloat16 too) are
kept.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh

from models.config import ModelConfig
from models.errors import InputError
from models.families import FAMILIES, family_of
from models.weights.assemble import assemble


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON file's object; raises InputError when it is missing or not JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object, got {values!r:.80}")
    return values


def read_config(folder: Path) -> ModelConfig:
    """Returns the config of the model in a folder."""
    values = read_json(folder / "config.json")
    return family_of(values).read_config(values)


def load_parameters(
    folder: Path, config: ModelConfig, dtype: jnp.dtype | None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Returns the parameters of the model in a folder, in `dtype` (None: as stored), spread over a mesh if given."""
    handles = {path: _open(path) for path in _shards(folder)}
    place = {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118 (not a dict)

    def read(name: str) -> np.ndarray:
        return np.asarray(place[name].get_tensor(name))

    family = FAMILIES[config.family]
    return assemble(config, family.hf, list(place), read, ignored=family.ignored, dtype=dtype, mesh=mesh)


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(f"{index} has no 'weight_map' object; fetch the file again")
        paths = sorted({folder / name for name in places.values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise InputError(f"{folder}: missing weights: {', '.join(missing) or 'no *.safetensors file'}")
    return paths


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="flax")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file (cut short or damaged? {error})") from error
