"""Measures a table: `python -m experiments.reproduce configs/tables/spec_bench.yaml --preset smoke`.

What a table shows depends on its config's `type` (`experiments.table_kinds`); without one its rows are methods and its
columns tasks (`experiments.method_table`). What is measured is kept and not measured again; an interrupted run goes on
where it stopped. Writes table.md, table.csv, plot.png and the raw runs to results/<table>/<preset>.
"""

import os
import sys

from experiments.config import chosen_type, load_config, save_config
from experiments.kept import locked
from experiments.runtime import run_main, setup_runtime
from experiments.table_kinds import KINDS
from models.errors import unknown_name


def main(argv: list[str] | None = None) -> None:
    """Loads the table's config, measures what is missing, writes the table."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    name = chosen_type(argv)
    if name not in KINDS:
        raise unknown_name("type of a table", str(name), [kind for kind in KINDS if kind is not None])
    kind = KINDS[name]
    description = (__doc__ or "").split("\n")[0]
    config = load_config(kind.config, argv, prog="python -m experiments.reproduce", description=description)
    kind.check(config)
    setup_runtime()
    with locked(config.folder, "--out"):
        save_config(config, config.folder / "config.yaml")
        written = kind.write_table(config, kind.measure(config))
    print(f"\n{written}\nsaved in {config.folder}{os.sep}")


if __name__ == "__main__":
    run_main(main)
