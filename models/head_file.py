"""Files of small trained heads: safetensors with facts about them, whole or not there at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import save_file

from models.errors import InputError
from models.weights.whole import whole_file


def write_head(path: Path, kind: str, values: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    """Writes a head.

    Args:
        path: the file; its folder is made.
        kind: what sort of head it is.
        values: its parameters, maps of arrays.
        facts: what the file's metadata is to say besides.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = {".".join(name): leaf for name, leaf in flatten_dict(values).items()}
    try:
        with whole_file(path) as partial:
            save_file(tensors, partial, {**facts, "kind": kind})
    except OSError as error:
        raise InputError(f"cannot write the head to {path}: {error}") from error


def read_head(path: Path, kind: str, main: str, flags: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a head's parameters and the facts about it.

    Args:
        path: a file of `write_head`.
        kind: the sort of head that is wanted.
        main: what trains such heads, as in `python -m MAIN`.
        flags: what to call it with.

    Raises:
        InputError: no such file, one that is cut short, or one that holds something else.
    """
    try:
        with safetensors.safe_open(path, framework="flax") as file:
            facts = file.metadata() or {}
            values = unflatten_dict({tuple(name.split(".")): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"no such head: {path}; train one with python -m {main} {flags}") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file (cut short or damaged? {error})") from error
    if facts.get("kind") != kind:
        raise InputError(f"{path} holds no {kind.replace('_', ' ')}: wanted a file of {main}")
    return values, facts
