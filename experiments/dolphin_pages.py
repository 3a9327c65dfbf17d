"""Dolphin's table as Markdown, CSV and a plot."""

import csv
from typing import TYPE_CHECKING

from experiments.runtime import machine
from experiments.train_pages import answer, grid

if TYPE_CHECKING:
    from experiments.dolphin_table import DolphinTableConfig, Measured

_STAGE = {"loss": ("held-out cross-entropy", ".4f"), "exact match": ("exact match", ".3f"),
          "seconds of an update": ("seconds of an update", ".2f")}  # fmt: skip
_PAPER = "Paper: 4.32 s against 20.71 s of the 7B model with the whole context (4.8 times), and a tenth of the energy."


def write_table(config: "DolphinTableConfig", measured: "Measured") -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    text = markdown(config, measured)
    (config.folder / "table.md").write_text(text, encoding="utf-8")
    with (config.folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "row", "measure", "value"])
        for parts in (measured.costs, measured.stages):
            for part, rows in parts.items():
                writer.writerows(
                    [part, row, name, value] for row, figures in rows.items() for name, value in figures.items()
                )
    _plot(config, measured)
    return text


def markdown(config: "DolphinTableConfig", measured: "Measured") -> str:
    """Returns the table's page."""
    settings = config.run.dolphin
    main, small = (config.run.model, settings.compressor) if config.size.scratch is None else ("a new model",) * 2
    lines = [
        *(f"# {config.title or config.table}", "", f"Preset {config.preset}. {machine()}", ""),
        f"{main} reads and writes, {small} compresses contexts into {settings.memory} embeddings. A request: the "
        f"context, a question of {config.question} tokens, an answer of {config.answer}.",
        *("", "## What a request costs", ""),
        *("| tokens | FLOPs, full / memory | ratio | bytes, full / memory | ratio | s, full / memory | ratio |",
          "|" + " --- |" * 7),
    ]  # fmt: skip
    for length, rows in sorted(measured.costs.items()):
        cells = [_both(rows, name, form) for name, form in (("flops", ".3g"), ("bytes", ".3g"), ("seconds", ".2f"))]
        lines.append(f"| {length} | {' | '.join(cells)} |")
    lines += ["", f"Operations and bytes are the proxies of energy, by formula (float32). {_PAPER}", ""]
    for stage, rows in measured.stages.items():
        lines += [f"## Stage: {stage}", "", f"{config.size.steps} updates.", "", *grid(_STAGE, rows, {}), ""]
    lines += [answer(claim, _all(measured), config.size.examples) for claim in config.claims]
    return "\n".join(lines).rstrip() + "\n"


def _all(measured: "Measured") -> dict[str, dict[str, float]]:
    """Returns {"ROW, LENGTH or STAGE": figures}: the rows that claims are about."""
    parts = {**measured.costs, **measured.stages}
    return {f"{row}, {part}": figures for part, rows in parts.items() for row, figures in rows.items()}


def _both(rows: dict[str, dict[str, float]], name: str, form: str) -> str:
    if any(name not in rows[row] for row in ("full", "memory")):
        return " | "
    full, short = rows["full"][name], rows["memory"][name]
    return f"{full:{form}} / {short:{form}} | {full / short:.2f}"


def _plot(config: "DolphinTableConfig", measured: "Measured") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in ("flops", "bytes", "seconds"):
        points = [(length, rows["full"][name] / rows["memory"][name]) for length, rows in
                  sorted(measured.costs.items()) if name in rows["full"]]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("full over memory")
    axes.legend()
    figure.savefig(config.folder / "plot.png", dpi=120)
