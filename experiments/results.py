"""Writes RESULTS.md from the saved runs of tables: `python -m experiments.results`.

Takes up results/<table>/<preset>/table.md of every bench and table config that has been run, in the order of the
configs' names; a section of the page as it stands stays where its bench or table has not been run here. Run it after
`experiments.reproduce`; what it writes is never edited by hand.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.config import chosen_type, dump_config, load_config
from experiments.runtime import run_main
from experiments.table_kinds import KINDS
from models.errors import InputError
from models.weights.whole import whole_file

_HEAD = """# Results

Measured with the commands below on the machine that each table names; written by `python -m experiments.results` from
the saved runs. Both sides of every comparison are of the same run and count token ids. Where a paper's claim does not
hold here, the line under the table says so: the models are small, the machine is not the paper's, and the columns
"paper" stand for other models and devices.
"""
_VERDICTS = ("reproduced", "within the noise", "not reproduced")
_BENCHES = (
    ("long_context_bench", "python -m experiments.bench_long_context --config configs/bench/long_context.yaml"),
    ("speculation_bench", "python -m experiments.bench_speculation --config configs/bench/speculation.yaml"),
    ("long_text_bench", "python -m experiments.bench --config configs/bench/long_text.yaml"),
    ("exact_check", "python -m experiments.check_exact --config configs/bench/exact.yaml"),
    ("train_bench", "python -m experiments.bench --config configs/bench/train.yaml"),
    ("constrained_bench", "python -m experiments.bench --config configs/bench/constrained.yaml"),
    ("decode_bench", "python -m experiments.bench --config configs/bench/decode.yaml"),
    ("beam_bench", "python -m experiments.bench --config configs/bench/beam.yaml"),
    ("isotropy_bench", "python -m experiments.bench --config configs/bench/isotropy.yaml"),
    ("core_infer_bench", "python -m experiments.bench --config configs/bench/core_infer.yaml"),
)


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
    """Where runs lie, and where the page goes."""

    results: Path = Path("results")
    tables: Path = Path("configs/tables")
    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    out: Path = Path("RESULTS.md")


def pages(config: ResultsConfig) -> dict[str, tuple[str, str]]:
    """Returns {command: (the flags that a saved run had besides, page)} of every bench and table that has been run."""
    found = {}
    for table, command in _commands(config):
        path = config.results / table / config.preset / "table.md"
        if path.is_file():
            flags = _flags(path.parent / "config.yaml", config.tables / f"{table}.yaml", config.preset)
            found[command] = flags, path.read_text(encoding="utf-8")
    return found


def _commands(config: ResultsConfig) -> list[tuple[str, str]]:
    """Returns (folder of the results, command) of every bench and table there is."""
    tables = sorted(config.tables.glob("*.yaml"))
    return [
        *_BENCHES,
        *((path.stem, f"python -m experiments.reproduce {path} --preset {config.preset}") for path in tables),
    ]


def _flags(saved: Path, shipped: Path, preset: str) -> str:
    """Returns the flags by which a saved run differs from the shipped config; files by their names alone."""
    if not (saved.is_file() and shipped.is_file()):
        return ""
    argv = ["--config", str(shipped), "--preset", preset]
    kind = KINDS[chosen_type(argv)].config
    then = _flat(yaml.safe_load(saved.read_text(encoding="utf-8")))
    now = _flat(yaml.safe_load(dump_config(load_config(kind, argv, prog="", description=""))))
    idle = ("out", "claims", "title")  # which change nothing that is measured
    changed = {name: value for name, value in then.items() if name not in idle and value != now.get(name)}
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


def section(command: str, page: str) -> str:
    """Returns a section of RESULTS.md: a page one heading lower, with its command."""
    title, _, rest = page.strip().partition("\n")
    lowered = "\n".join(f"#{line}" if line.startswith("#") else line for line in rest.strip().splitlines())
    return f"#{title}\n\n`{command}`\n\n{lowered}\n"


def standing(text: str) -> dict[str, str]:
    """Returns {command with its flags: section} of a RESULTS.md."""
    found = {}
    for part in text.split("\n## ")[1:]:
        lines = part.split("\n")
        if len(lines) > 2 and lines[2].startswith("`"):
            found[lines[2].strip("`")] = f"## {part.strip()}\n"
    return found


def render(config: ResultsConfig, found: dict[str, tuple[str, str]]) -> str:
    """Returns RESULTS.md: what has been run here, and of the rest the sections that stand."""
    old = standing(config.out.read_text(encoding="utf-8")) if config.out.is_file() else {}
    sections = []
    for _, command in _commands(config):
        if command in found:
            flags, page = found[command]
            sections.append(section(command + flags, page))
        same, preset = command.partition(" --preset ")[::2]
        for whole, text in old.items():
            is_other = preset and not f"{whole} ".startswith(f"{command} ")
            if f"{whole} ".startswith(f"{same} ") and (command not in found or is_other):
                sections.append(text)
    return "\n".join([_HEAD, contents(sections), *sections])


def contents(sections: list[str]) -> str:
    """Returns a list of the sections, and how many of each one's claims hold."""
    lines = ["| what | " + " | ".join(_VERDICTS) + " |", "| --- | --- | --- | --- |"]
    for text in sections:
        counts = [text.count(f"**{verdict}**") for verdict in _VERDICTS]
        shown = " | ".join(str(count) if any(counts) else "" for count in counts)
        lines.append(f"| {text.partition(chr(10))[0].removeprefix('## ')} | {shown} |")
    return "\n".join(["What papers claim, and whether it holds here:", "", *lines, ""])


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
    text = render(config, found)
    with whole_file(config.out) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{len(found)} tables written to {config.out}, {len(standing(text)) - len(found)} kept as they stood")


if __name__ == "__main__":
    run_main(main)
