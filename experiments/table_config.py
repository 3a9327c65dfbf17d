"""What the configs of all tables have: a name, a preset, a folder; rows and claims that fit together."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class TableFrame:
    """The frame of a table's config; `rows`, `presets` and `claims` are its own where it has them."""

    table: str = "table"  # its name, and its folder's
    title: str = ""
    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    out: Path | None = None  # None: results/<table>/<preset>

    @property
    def size(self) -> Any:
        """The preset that is run."""
        return getattr(self.presets, self.preset)

    @property
    def chosen(self) -> tuple[Any, ...]:
        """The rows that are run: those that the preset names, or all."""
        return tuple(row for row in self.rows if not self.size.rows or row.name in self.size.rows)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.out or Path("results") / self.table / self.preset

    def check_rows(self, names: Sequence[str], reserved: Sequence[str] = ()) -> None:
        """Raises ValueError where there are no rows, two share a name, or one has a name that is reserved."""
        if not names or len({*names, *reserved}) != len(names) + len(reserved):
            besides = f", other than {', '.join(map(repr, reserved))}" if reserved else ""
            raise ValueError(f"there must be rows, with names of their own{besides}; got {', '.join(names) or 'none'}")

    def check_presets(self, names: Sequence[str]) -> None:
        """Raises ValueError where a preset names a row that there is not."""
        for preset in (self.presets.smoke, self.presets.cpu, self.presets.gpu):
            if not set(preset.rows) <= set(names):
                raise ValueError(f"a preset's rows must choose among the rows of this table: {', '.join(names)}")

    def check_claims(self, names: Sequence[str]) -> None:
        """Raises ValueError where a claim compares a row that there is not."""
        for claim in self.claims:
            if not {claim.row, claim.than} <= set(names):
                raise ValueError(f"claim {claim.text!r} must compare rows of this table: {', '.join(names)}")
