"""Figures that are kept in files, each with a fingerprint of what it was measured on, and folders held by one run."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.weights.whole import whole_file


def cell_key(*parts: Any) -> str:
    """Returns a fingerprint of what a cell is measured on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read_kept(path: Path, key: str) -> dict[str, Any] | None:
    """Returns the JSON object that was kept under this key; None where there is none, or a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return kept if isinstance(kept, dict) and kept.get("key") == key else None


def keep(path: Path, key: str, **values: Any) -> None:
    """Keeps a JSON object under a key; the file appears whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps({"key": key, **values}), encoding="utf-8")


@contextmanager
def locked(folder: Path, other: str) -> Iterator[None]:
    """Holds a folder for one run; raises InputError where another run holds it, or where it cannot be written.

    Args:
        folder: made if need be.
        other: the flag that names another folder.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another run is writing to {folder}: wait for it, or choose another folder with {other}"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}") from error
    try:
        yield
    finally:
        lock.release()
