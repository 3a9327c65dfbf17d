"""Writes RESULTS.md from the saved runs of tables: `python -m experiments.results`.

Takes up results/<table>/<preset>/table.md of every table config that has been run, in the order of the configs' names.
Run it after `experiments.reproduce`; what it writes is never edited by hand.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import yaml

from experiments.config import load_config
from experiments.runtime import run_main
from models.errors import InputError

_HEAD = """# Results

Measured with the commands below on the machine that each table names; written by `python -m experiments.results` from
the saved runs. Both sides of every comparison are of the same run and count token ids. Where a paper's claim does not
hold here, the line under the table says so: the models are small, the machine is not the paper's, and the columns
"paper" stand for other models and devices.
"""
_BENCH = ("speculation_bench", "python -m experiments.bench_speculation --config configs/bench/speculation.yaml")


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
    for table, command in [_BENCH, *commands]:
        path = config.results / table / config.preset / "table.md"
        if path.is_file():
            found.append((command + _questions(path.parent, config.tables), path.read_text(encoding="utf-8")))
    return found


def _questions(run: Path, tables: Path) -> str:
    """Returns the flag of a run whose questions are not the shipped ones; the file by its name alone."""
    saved = run / "config.yaml"
    if not saved.is_file():
        return ""
    questions = yaml.safe_load(saved.read_text(encoding="utf-8")).get("questions")
    if questions is None or (tables.parent / "prompts" / Path(questions).name).is_file():
        return ""
    return f" --questions {Path(questions).name}"


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
