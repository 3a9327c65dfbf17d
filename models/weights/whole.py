"""Files and folders that appear complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a private path beside a file, to write to, which takes the file's place when the block ends without an
    error. Its folder is made; an OSError is the caller's to explain.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    private = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield private
        os.replace(private, path)
    finally:
        private.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path | str, mark: str | None = None) -> Iterator[Path]:
    """Gives a private folder to write into, which takes its place when the block ends without an error.

    Args:
        folder: where it is to stand; parents are made.
        mark: a file that tells folders of this kind: one that stands there already is then replaced.

    Raises:
        InputError: something (else) stands there, or writing fails.
    """
    folder = Path(folder)
    if folder.exists() and not (mark is not None and (folder / mark).is_file()):
        raise InputError(f"{folder} exists already; choose another folder or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error}") from error
    try:
        staging = private / "new"  # a plain folder: what mkdtemp makes only its owner may read
        staging.mkdir()
        yield staging
        if folder.exists():
            os.replace(folder, private / "old")
        os.replace(staging, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(private, ignore_errors=True)
