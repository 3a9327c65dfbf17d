"""A table of training runs as Markdown, CSV and a plot."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.pages import save_table
from experiments.runtime import machine
from experiments.tables import share_error, verdict

if TYPE_CHECKING:
    from experiments.train_table import TrainClaim, TrainTableConfig

Figures = Mapping[str, float]
Rows = Mapping[str, Figures]
HELD_OUT = "eval/cross_entropy"
COLUMNS = {  # measure -> (title, format)
    HELD_OUT: ("held-out cross-entropy", ".4f"),
    "eval/exact_match": ("exact match", ".3f"),
    "size/trainable": ("trained numbers", ",.0f"),
    "size/moved": ("of them moved by an update, on average", ",.0f"),
    "size/finished": ("of them left at the end", ",.0f"),
    "size/optimizer": ("optimiser's numbers", ",.0f"),
    "size/step_bytes": ("bytes of an update", ",.0f"),
    "perf/step_seconds": ("seconds per update", ".3f"),
    "learning_rate": ("learning rate", "g"),
}
TEXT_COLUMNS = {
    "temperature": ("temperature", ".3f"),
    "true_log_prob": ("log-probability under the truth", ".3f"),
    "possible": ("possible words", ".4f"),
    "type_token_ratio": ("type-token ratio", ".3f"),
    "distinct_3": ("distinct-3", ".3f"),
    "rep_2": ("rep-2", ".3f"),
    "rep_4": ("rep-4", ".3f"),
    "self_bleu": ("self-BLEU", ".3f"),
    "entropy": ("entropy, bits", ".3f"),
    "top_mass": ("mass on the likeliest", ".3f"),
    "perplexity": ("held-out perplexity", ".2f"),
    "fit": ("loss on training texts", ".3f"),
    "overlap_mean": ("longest copy, mean", ".1f"),
    "overlap_max": ("longest copy, most", ".0f"),
}


def write_table(config: "TrainTableConfig", measured: tuple[Rows, Rows]) -> str:
    """Writes table.md, table.csv and plot.png of (rows, rows of texts) to the config's folder; returns the Markdown."""
    rows, texts = measured
    text = markdown(config, rows, texts)
    save_table(config.folder, text, {**rows, **texts})
    _plot(rows, config.folder / "plot.png")
    return text


def markdown(config: "TrainTableConfig", rows: Rows, texts: Rows) -> str:
    """Returns the table's page."""
    lines = [f"# {config.title or config.table}", "", _setting(config), "", machine(), ""]
    lines += [*grid(COLUMNS, rows, {row.name: row.paper for row in config.rows}), ""]
    lines += ["The bytes of an update are all that its compiled code holds at once, but for the frozen model.", ""]
    if texts:
        lines += ["## What the models write", "", _writing(config), ""]
        lines += [*grid(TEXT_COLUMNS, texts, {row.name: row.paper for row in config.texts}), ""]
    lines += [answer(claim, {**rows, **texts}, config.size.examples) for claim in config.claims]
    return "\n".join(lines).rstrip() + "\n"


def grid(columns: Mapping[str, tuple[str, str]], rows: Rows, papers: Mapping[str, str]) -> list[str]:
    """Returns a table's lines; columns without a figure are left out, and so is the paper's where it says nothing."""
    shown = {name: column for name, column in columns.items() if any(name in figures for figures in rows.values())}
    told = any(papers.get(row) for row in rows)
    titles = ["row", *(title for title, _ in shown.values()), *(["paper"] if told else [])]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for row, figures in rows.items():
        values = [_shown(figures, name, form) for name, (_, form) in shown.items()]
        lines.append(f"| {' | '.join([row, *values, *([papers.get(row, '')] if told else [])])} |")
    return lines


def _shown(figures: Figures, name: str, form: str) -> str:
    """Returns a figure as text, with its standard error where it has one; "" where it was not measured."""
    if name not in figures:
        return ""
    error = figures.get(f"{name}/error", 0.0)
    return format(figures[name], form) + (f" ± {format(error, form)}" if error else "")


def answer(claim: "TrainClaim", rows: Rows, examples: int = 1) -> str:
    """Returns a line on a claim with both figures: reproduced here or not, or a difference within two standard errors.

    Args:
        claim: about two rows.
        rows: their figures.
        examples: questions that were answered, of which shares of right answers have their error.
    """
    if any(claim.measure not in rows.get(row, {}) for row in (claim.row, claim.than)):
        return f"- {claim.text}: **not measured** here."
    ours, theirs = rows[claim.row][claim.measure], rows[claim.than][claim.measure]
    gap = claim.factor * theirs - ours if claim.below else ours - claim.factor * theirs
    errors = [rows[row].get(f"{claim.measure}/error", 0.0) for row in (claim.row, claim.than)]
    if claim.measure == "eval/exact_match":
        errors = [share_error(share, examples) for share in (ours, theirs)]
    side = "below" if claim.below else "above"
    wanted = f", to be {side} {claim.factor:g} times it" if claim.factor != 1 else f", to be {side} it"
    found = verdict(gap, math.hypot(errors[0], claim.factor * errors[1]))
    return f"- {claim.text}: **{found}** here ({claim.row} {ours:.4g}, {claim.than} {theirs:.4g}{wanted})."


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
        f"rows of {run.length} tokens. Of several learning rates the one with the least held-out cross-entropy is "
        "shown; rows run one after another, so that seconds carry the machine's noise."
    )


def _writing(config: "TrainTableConfig") -> str:
    settings, size = config.continuations, config.size
    runs = f"; means and standard errors of {size.seeds} runs" if size.seeds > 1 else ""
    return (
        f"{size.examples} held-out texts at most, of which {settings.read} tokens are read and {settings.new_tokens} "
        f"written{runs}. Temperature 0 is greedy; entropy, mass and perplexity are of the laws on the held-out texts."
    )


def _plot(rows: Rows, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row, figures in rows.items():
        if "size/trainable" in figures:  # a row that came to nothing has no size
            axes.scatter(figures["size/trainable"], figures[HELD_OUT])
            axes.annotate(f" {row}", (figures["size/trainable"], figures[HELD_OUT]))
    axes.set_xscale("log")
    axes.set_xlabel("trained numbers")
    axes.set_ylabel("held-out cross-entropy")
    figure.savefig(path, dpi=120)
