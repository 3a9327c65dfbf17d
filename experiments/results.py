"""Writes RESULTS.md from the saved runs of tables: `python -m experiments.results`.

Takes up results/<table>/<preset>/table.md of every table config that has been run, in the order of the configs' names.
Run it after `experiments.reproduce`; what it writes is never edited by hand.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.config import chosen_type, dump_config, load_config
from experiments.reproduce import TableConfig
from experiments.runtime import run_main
from experiments.train_table import TrainTableConfig
from experiments.yi_table import YiTableConfig
from models.errors import InputError

_HEAD = """# Results

Measured with the commands below on the machine that each table names; written by `python -m experiments.results` from
the saved runs. Both sides of every comparison are of the same run and count token ids. Where a paper's claim does not
hold here, the line under the table says so: the models are small, the machine is not the paper's, and the columns
"paper" stand for other models and devices.
"""
_BENCHES = (
    ("long_context_bench", "python -m experiments.bench_long_context --config configs/bench/long_context.yaml"),
    ("speculation_bench", "python -m experiments.bench_speculation --config configs/bench/speculation.yaml"),
    ("long_text_bench", "python -m experiments.bench --config configs/bench/long_text.yaml"),
    ("exact_check", "python -m experiments.check_exact --config configs/bench/exact.yaml"),
    ("train_bench", "python -m experiments.bench --config configs/bench/train.yaml"),
    ("core_infer_bench", "python -m experiments.bench --config configs/bench/core_infer.yaml"),
)


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
    """Where runs lie, and where the page goes."""

    results: Path = Path("results")
    tables: Path = Path("configs/tables")
    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    out: Path = Path("RESULTS.md")


def pages(config: ResultsConfig) -> list[tuple[str, str]]:
    """Returns (command, page) of every table that has been run."""
    commands = [
        (path.stem, f"python -m experiments.reproduce {path} --preset {config.preset}")
        for path in sorted(config.tables.glob("*.yaml"))
    ]
    found = []
    for table, command in [*_BENCHES, *commands]:
        path = config.results / table / config.preset / "table.md"
        if path.is_file():
            flags = _flags(path.parent / "config.yaml", config.tables / f"{table}.yaml", config.preset)
            found.append((command + flags, path.read_text(encoding="utf-8")))
    return found


def _flags(saved: Path, shipped: Path, preset: str) -> str:
    """Returns the flags by which a saved run differs from the shipped config; files by their names alone."""
    if not (saved.is_file() and shipped.is_file()):
        return ""
    argv = ["--config", str(shipped), "--preset", preset]
    kind = {"training": TrainTableConfig, "yi": YiTableConfig}.get(chosen_type(argv), TableConfig)
    then = _flat(yaml.safe_load(saved.read_text(encoding="utf-8")))
    now = _flat(yaml.safe_load(dump_config(load_config(kind, argv, prog="", description=""))))
    changed = {name: value for name, value in then.items() if name != "out" and value != now.get(name)}
    other = tuple(f"presets.{name}." for name in ("smoke", "cpu", "gpu") if name != preset)
    return "".join(f" --{name} {_shown(value)}" for name, value in changed.items() if not name.startswith(other))


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Returns settings by dotted names; lists count as one value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat


def _shown(value: Any) -> str:
    """Returns a value as a flag takes it; of a list of sections only that it is another one."""
    if isinstance(value, list):
        return "(another list)" if any(isinstance(item, Mapping) for item in value) else " ".join(map(str, value))
    return Path(value).name if isinstance(value, str) and value.startswith("/") else str(value)


def render(found: list[tuple[str, str]]) -> str:
    """Returns RESULTS.md: every page one heading lower, with its command."""
    sections = [_HEAD]
    for command, page in found:
        title, _, rest = page.strip().partition("\n")
        lowered = "\n".join(f"#{line}" if line.startswith("#") else line for line in rest.strip().splitlines())
        sections.append(f"#{title}\n\n`{command}`\n\n{lowered}\n")
    return "\n".join(sections)


def main() -> None:
    """Writes the page."""
    config = load_config(
        ResultsConfig, prog="python -m experiments.results", description=(__doc__ or "").split("\n")[0]
    )
    found = pages(config)
    if not found:
        raise InputError(
            f"no table has been run with preset {config.preset}: nothing in {config.results}; run python -m "
            "experiments.reproduce first"
        )
    config.out.write_text(render(found), encoding="utf-8")
    print(f"{len(found)} tables in {config.out}")


if __name__ == "__main__":
    run_main(main)
