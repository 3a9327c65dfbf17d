"""Files of a table: the page itself, and its figures one to a line."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.weights.whole import whole_file


def save_table(folder: Path, text: str, rows: Mapping[Any, Mapping[str, Any]], keys: Sequence[str] = ("row",)) -> None:
    """Writes table.md and table.csv.

    Args:
        folder: of the table.
        text: the page.
        rows: figures by row; where `keys` are several, by tuples of as many.
        keys: what the columns before `measure` and `value` are called.
    """
    with whole_file(folder / "table.md") as page:
        page.write_text(text, encoding="utf-8")
    with whole_file(folder / "table.csv") as figures_file, figures_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "measure", "value"])
        for row, figures in rows.items():
            own = row if isinstance(row, tuple) else (row,)
            writer.writerows([*own, name, value] for name, value in figures.items())
