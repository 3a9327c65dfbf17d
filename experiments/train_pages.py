"""A table of training runs as Markdown, CSV and a plot."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.tables import machine

if TYPE_CHECKING:
    from experiments.train_table import TrainClaim, TrainTableConfig

Figures = Mapping[str, float]
COLUMNS = {  # measure -> (title, format)
    "eval/loss": ("held-out loss", ".4f"),
    "eval/exact_match": ("exact match", ".3f"),
    "size/trainable": ("trained numbers", ",.0f"),
    "size/finished": ("of them left at the end", ",.0f"),
    "size/optimizer": ("optimiser's numbers", ",.0f"),
    "size/step_bytes": ("bytes of an update", ",.0f"),
    "perf/step_seconds": ("seconds per update", ".3f"),
    "learning_rate": ("learning rate", "g"),
}


def write_table(config: "TrainTableConfig", rows: Mapping[str, Figures]) -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    text = markdown(config, rows)
    (config.folder / "table.md").write_text(text, encoding="utf-8")
    with (config.folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "measure", "value"])
        writer.writerows([row, name, value] for row, figures in rows.items() for name, value in figures.items())
    _plot(rows, config.folder / "plot.png")
    return text


def markdown(config: "TrainTableConfig", rows: Mapping[str, Figures]) -> str:
    """Returns the table's page."""
    shown = {name: form for name, form in COLUMNS.items() if any(name in figures for figures in rows.values())}
    papers = {row.name: row.paper for row in config.rows}
    lines = [f"# {config.title or config.table}", "", _setting(config), "", machine(), ""]
    lines += [
        f"| row | {' | '.join(title for title, _ in shown.values())} | paper |",
        f"|{' --- |' * (len(shown) + 2)}",
    ]
    for row, figures in rows.items():
        values = [format(figures[name], form) if name in figures else "" for name, (_, form) in shown.items()]
        lines.append(f"| {row} | {' | '.join(values)} | {papers.get(row, '')} |")
    lines += ["", "The bytes of an update are all that its compiled code holds at once, but for the frozen model.", ""]
    lines += [answer(claim, rows) for claim in config.claims]
    return "\n".join(lines).rstrip() + "\n"


def answer(claim: "TrainClaim", rows: Mapping[str, Figures]) -> str:
    """Returns a line on a claim: reproduced here or not, with both figures."""
    if any(claim.measure not in rows.get(row, {}) for row in (claim.row, claim.than)):
        return f"- {claim.text}: **not measured** here."
    ours, theirs = rows[claim.row][claim.measure], rows[claim.than][claim.measure]
    bound = claim.factor * theirs
    verdict = "reproduced" if (ours < bound if claim.below else ours > bound) else "not reproduced"
    side = "below" if claim.below else "above"
    wanted = f", to be {side} {claim.factor:g} times it" if claim.factor != 1 else f", to be {side} it"
    return f"- {claim.text}: **{verdict}** here ({claim.row} {ours:.4g}, {claim.than} {theirs:.4g}{wanted})."


def _setting(config: "TrainTableConfig") -> str:
    size, run = config.size, config.run
    shape = config.start.scratch if config.start is not None else None
    start = (
        f"a new model of {shape.layers} layers, width {shape.width}, trained for {size.base_steps} updates"
        if shape is not None
        else run.model
    )
    return (
        f"Preset {config.preset}: every row starts from {start}, and makes {size.steps} updates of {run.batch_size} "
        f"rows of {run.length} tokens. Of several learning rates the one with the least held-out loss is shown."
    )


def _plot(rows: Mapping[str, Figures], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row, figures in rows.items():
        if "size/trainable" in figures:
            axes.scatter(figures["size/trainable"], figures["eval/loss"])
            axes.annotate(f" {row}", (figures["size/trainable"], figures["eval/loss"]))
    axes.set_xscale("log")
    axes.set_xlabel("trained numbers")
    axes.set_ylabel("held-out loss")
    figure.savefig(path, dpi=120)
