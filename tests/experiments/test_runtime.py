"""Exit codes and messages of a real process, and the compilation cache."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.runtime import forget_programs, run_main, setup_runtime
from models.errors import InputError

ROOT = Path(__file__).parents[2]
SAMPLE = f"""
import dataclasses, sys, types
# `models` without what its __init__ imports: only the mains' own imports count here.
models = types.ModuleType("models")
models.__path__ = [{str(ROOT / "models")!r}]
sys.modules["models"] = models
sys.path.insert(0, {str(ROOT)!r})
from experiments.config import dump_config, load_config
from experiments.runtime import run_main

@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 1
    def __post_init__(self):
        if self.steps == 13:
            raise ValueError("steps must not be 13")

def main():
    try:
        config = load_config(Config, prog="sample", description="Does things.")
    finally:
        assert not {{"jax", "flax", "numpy", "torch"}} & set(sys.modules), "a config needs none of these"
    if config.steps == 99:
        raise RuntimeError("a bug")
    print(dump_config(config))

if __name__ == "__main__":
    run_main(main)
"""


@pytest.fixture
def run(tmp_path):
    """Runs the sample main in a process of its own."""
    (tmp_path / "sample.py").write_text(SAMPLE)

    def run_sample(*argv: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-W", "error", "sample.py", *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run_sample


def test_a_good_config_runs(run, tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 5\n")
    done = run("--config", "a.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "steps: 5\n\n", "")


@pytest.mark.parametrize(
    ("text", "argv", "wanted"),
    [
        ("step: 5", [], "error: a.yaml:1: unknown config key 'step'. Did you mean 'steps'? Known: steps.\n"),
        ("steps: '5'", [], "error: a.yaml:1: config key 'steps': wanted int, got '5' (str).\n"),
        ("steps: [", [], "error: a.yaml:1: not valid YAML: "),
        ("steps: 13", [], "error: a.yaml: steps must not be 13\n"),
        ("steps: 5", ["--steps", "13"], "steps must not be 13"),
        ("steps: 5", ["--step", "3"], "--steps INT"),
        ("steps: 5", ["--steps", "x"], "--steps"),
        ("steps: 5", ["--config", "b.yaml"], "error: --config takes one YAML file"),
    ],
)
def test_mistakes_exit_with_code_2_and_no_traceback(text, argv, wanted, run, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    done = run("--config", "a.yaml", *argv)
    assert done.returncode == 2
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr and "pydantic" not in done.stderr
    assert done.stdout == ""


def test_help_is_printed_without_loading_jax(run):
    done = run("--help")
    assert done.returncode == 0 and "--steps INT" in done.stdout and done.stderr == ""


def test_bugs_keep_their_traceback(run):
    done = run("--steps", "99")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


def test_a_reader_who_leaves_early_gets_no_traceback(tmp_path):
    lines = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "from experiments.runtime import run_main",
        "def main():",
        "    for _ in range(9999):",
        "        print('x' * 99)",
        "run_main(main)",
    )
    (tmp_path / "sample.py").write_text("\n".join(lines))
    command = f"{sys.executable} {tmp_path / 'sample.py'} | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x" * 99 + "\n", "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(InputError("no such x"), 2, "error: no such x\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_exit_codes(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == words


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts memory maps")
def test_programs_are_forgotten_when_they_take_many_memory_maps():
    double = jax.jit(lambda x: 2 * x)
    double(1.0)
    assert not forget_programs(share=1.0) and double._cache_size() == 1
    assert forget_programs(share=0.0) and double._cache_size() == 0


NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def cache_settings():
    """Reads the cache's settings; puts them back after the test."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield lambda: tuple(getattr(jax.config, name) for name in NAMES)
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_compilations_are_kept(folder, cache_settings, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("FLEETLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if folder:
        monkeypatch.setenv("FLEETLM_CACHE", str(tmp_path / folder))
    setup_runtime()
    assert cache_settings() == (str(tmp_path / (folder or ".cache/fleetlm") / "xla"), 0.5, -1)


def test_the_users_own_cache_stays(cache_settings, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    before = cache_settings()
    setup_runtime()
    assert cache_settings() == before
