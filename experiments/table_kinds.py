"""The kinds of tables, by the `type` of their config; a config without one is a table of methods."""

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import (
    aligned_table,
    codet5plus_pages,
    codet5plus_table,
    dolphin_pages,
    dolphin_table,
    knob_config,
    knob_pages,
    knob_table,
    method_table,
    moe_x_pages,
    moe_x_table,
    roe_pages,
    roe_table,
    search_table,
    train_pages,
    train_table,
    yi_pages,
    yi_table,
)


def _no_check(config: Any) -> None:
    """Accepts every config that was built."""


class Kind(NamedTuple):
    """A kind of table: what it is set by, and the two steps that make one.

    The config has the fields table, preset, out and the property folder.
    """

    config: type
    measure: Callable[[Any], Any]  # measures what is missing in the config's folder, and returns what the table shows
    write_table: Callable[[Any, Any], str]  # writes table.md, table.csv and plot.png; returns the Markdown
    check: Callable[[Any], None] = _no_check  # raises InputError before anything is written or loaded


KINDS: dict[str | None, Kind] = {
    None: Kind(method_table.TableConfig, method_table.measure, method_table.write_table, method_table.check),
    "codet5plus": Kind(codet5plus_table.CodeT5PlusTableConfig, codet5plus_table.measure, codet5plus_pages.write_table),
    "dolphin": Kind(dolphin_table.DolphinTableConfig, dolphin_table.measure, dolphin_pages.write_table),
    "grammar_aligned": Kind(aligned_table.AlignedTableConfig, aligned_table.measure, aligned_table.write_table),
    "knob": Kind(knob_config.KnobTableConfig, knob_table.measure, knob_pages.write_table),
    "moe_x": Kind(moe_x_table.MoeXTableConfig, moe_x_table.measure, moe_x_pages.write_table),
    "return_of_the_encoder": Kind(roe_table.RoeTableConfig, roe_table.measure, roe_pages.write_table),
    "search": Kind(search_table.SearchTableConfig, search_table.measure, search_table.write_table),
    "training": Kind(train_table.TrainTableConfig, train_table.measure, train_pages.write_table),
    "yi": Kind(yi_table.YiTableConfig, yi_table.measure, yi_pages.write_table),
}
