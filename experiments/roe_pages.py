"""Return of the Encoder's table as Markdown, CSV and a plot."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.pages import save_table
from experiments.runtime import machine
from experiments.train_pages import HELD_OUT, answer, grid

if TYPE_CHECKING:
    from experiments.roe_table import RoeTableConfig

Rows = Mapping[str, Mapping[str, float]]
_QUALITY = {
    "size/trainable": ("parameters", ",.0f"),
    HELD_OUT: ("held-out cross-entropy", ".4f"),
    "eval/exact_match": ("exact match", ".3f"),
    "eval/exact_match/find": ("find", ".3f"),
    "eval/exact_match/gather": ("gather", ".3f"),
    "perf/step_seconds": ("seconds per update", ".3f"),
}
_SPEED = {
    "first_token": ("seconds to the first token", ".4f"),
    "next_token": ("seconds per token behind it", ".4f"),
    "tokens_per_second": ("tokens per second", ".1f"),
    "cache": ("bytes of the cache", ",.0f"),
}


def write_table(config: "RoeTableConfig", rows: Rows) -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    text = markdown(config, rows)
    save_table(config.folder, text, rows)
    _plot(config, rows)
    return text


def markdown(config: "RoeTableConfig", rows: Rows) -> str:
    """Returns the table's page."""
    size, run = config.size, config.run
    lines = [f"# {config.title or config.table}", "", f"Preset {config.preset}. {machine()}", "", "## Quality", ""]
    lines += [
        f"{size.steps} updates of {run.batch_size} questions; {size.examples} others are answered. The teacher is "
        f"decoder-only, of {config.teacher.layers} layers and width {config.teacher.width}, and was trained for "
        f"{size.teacher_steps} updates. All rows have the same parameters: MLPs are as wide as that takes.",
        "",
        *grid(_QUALITY, rows, {row.name: row.paper for row in config.rows}),
        "",
        "## Speed",
        "",
        f"New models of {next(iter(rows.values()), {}).get('parameters', 0):,.0f} parameters, one text at a time, "
        f"{size.new_tokens} tokens written; medians of {size.repeats}.",
        "",
    ]
    for length in size.lengths:
        columns = {f"{name}/{length}": (title, form) for name, (title, form) in _SPEED.items()}
        one_each = {row.reads: row.name for row in reversed(config.chosen)}
        shown = {name: rows[name] for name in reversed(one_each.values())}
        lines += [f"{length} tokens read:", "", *grid(columns, shown, {}), ""]
    lines += [answer(claim, rows, size.examples) for claim in config.claims]
    return "\n".join(lines).rstrip() + "\n"


def _plot(config: "RoeTableConfig", rows: Rows) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lengths = config.size.lengths
    for reads in dict.fromkeys(row.reads for row in config.chosen):
        name = next(row.name for row in config.chosen if row.reads == reads)
        axes.plot(lengths, [rows[name][f"first_token/{length}"] for length in lengths], marker="o", label=name)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("seconds to the first token")
    axes.legend()
    figure.savefig(config.folder / "plot.png", dpi=120)
