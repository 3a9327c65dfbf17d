"""`load_model`: a model by name or path, ready to run."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from models.config import ModelConfig
from models.encoder_decoder import Network, network
from models.errors import InputError, unknown_name
from models.weights import gguf, orbax, safetensors
from models.weights.fetch import fetch
from models.weights.registry import MODELS
from models.weights.tokenizer import Tokenizer, check_vocabulary


class LoadedModel(NamedTuple):
    """A network, its parameters and its tokenizer (None where the folder has none)."""

    model: Network
    params: dict[str, Any]
    tokenizer: Tokenizer | None


def load_model(name: str | Path, dtype: str | None = None, mesh: Mesh | None = None) -> LoadedModel:
    """Loads a model.

    Args:
        name: a name in `models.weights.registry.MODELS` (fetched on first use), a .gguf file, a Hugging Face folder
            (config.json and safetensors), or a folder written by `models.weights.orbax.save_model`.
        dtype: "float32" or "bfloat16"; None keeps what is stored, and float32 for GGUF. float32 is the fastest on CPUs.
        mesh: of `models.sharding.make_mesh`: parameters go straight to the devices that hold them. None: the default
            device.

    Raises:
        InputError: an unknown name, a missing or damaged file, an architecture or tensor type that is not supported.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype must be float32 or bfloat16 (or left out), got {dtype!r}")
    path = find_model(name)
    wanted = None if dtype is None else jnp.dtype(dtype)
    config, params, tokenizer = (_load_gguf if path.is_file() else _load_folder)(path, wanted, mesh)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    return LoadedModel(network(config), params, tokenizer)


def read_config(name: str | Path) -> ModelConfig:
    """Returns the config of a model, named as for `load_model`, without reading its weights."""
    path = find_model(name)
    if path.is_file():
        return gguf.GGUFFile(path).config
    return (orbax if (path / orbax.CONFIG_NAME).exists() else safetensors).read_config(path)


def find_model(name: str | Path) -> Path:
    """Returns the file or folder of a model, fetching it if it is a registry name that is not in the cache yet."""
    path = Path(name).expanduser()
    if str(name) in MODELS:
        return fetch(str(name))
    if path.exists():
        return path
    if path.suffix or len(path.parts) > 1 or str(name).startswith((".", "/")):
        raise InputError(f"no such file or folder: {path}")
    raise unknown_name("model", str(name), MODELS)


def _load_gguf(path: Path, dtype: jnp.dtype | None, mesh: Mesh | None) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    file = gguf.GGUFFile(path)
    return file.config, gguf.load_parameters(file, dtype, mesh), Tokenizer.from_gguf(file.fields)


def _load_folder(
    folder: Path, dtype: jnp.dtype | None, mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any], Tokenizer | None]:
    source = orbax if (folder / orbax.CONFIG_NAME).exists() else safetensors
    config = source.read_config(folder)
    params = source.load_parameters(folder, config, dtype, mesh)
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
    return config, params, tokenizer
