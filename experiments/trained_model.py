"""Models that a table's rows need, trained where they do not exist yet from the table's own model."""

import dataclasses
import functools
import hashlib
from pathlib import Path

from experiments.config import load_config
from experiments.train_config import TrainConfig
from models.errors import InputError

_PROG = "python -m experiments.train"
NAME = "model"  # of the folder, in that of the run


def ensure_model(folder: Path, train: Path | None, model: str, dtype: str | None) -> None:
    """Trains a model where its folder does not exist yet, in a run of the folder above it.

    Args:
        folder: the trained model's, called model.
        train: a config of experiments.train, for everything but the model that it starts from and the folder; None:
            none can be trained.
        model: that it starts from.
        dtype: of that.

    Raises:
        InputError: no folder and no config, a folder with another name, a config that trains an adapter, or what
            training raises.
    """
    if folder.is_dir():
        return
    if train is None or folder.name != NAME:
        raise InputError(f"no such model: {folder}; name a config of {_PROG} that trains it, and a folder .../{NAME}")
    config = load_config(TrainConfig, ["--config", str(train)], prog=_PROG, description="")
    if config.adapter is not None:
        raise InputError(f"{train} trains an adapter, and a row needs a whole model: set adapter to null")
    from experiments.training import run_training

    print(f"training the model {folder} first ({train})", flush=True)
    run_training(dataclasses.replace(config, model=model, dtype=dtype, run_dir=folder.parent))


@functools.lru_cache
def model_stamp(folder: Path | None) -> str:
    """Returns a SHA-256 of a model's files, "" where there is none."""
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
