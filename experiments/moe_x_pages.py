"""MoE-X's table as Markdown, CSV and a plot."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.pages import save_table
from experiments.runtime import machine
from experiments.train_pages import HELD_OUT, answer, grid

if TYPE_CHECKING:
    from experiments.moe_x_table import MoeXTableConfig

Rows = Mapping[str, Mapping[str, float]]
_SHARED = {
    "parameters": ("parameters", ",.0f"),
    "active": ("of them active", ",.0f"),
    HELD_OUT: ("held-out cross-entropy", ".4f"),
    "floor": ("of the law itself", ".4f"),
    "coverage": ("coverage", ".3f"),
    "coverage_shuffled": ("of shuffled labels", ".3f"),
    "reconstruction": ("reconstruction", ".3f"),
}
_WORK = {
    "l0": ("neurons other than zero", ".1f"),
    "dead": ("never above zero", ".3f"),
    "score_vs_fired": ("router's score with neurons that fire, correlation", ".3f"),
    "load_least": ("least used expert", ".3f"),
    "load_most": ("most used expert", ".3f"),
    "perf/step_seconds": ("seconds per update", ".3f"),
}
_BOARD = {"conflicts": ("squares with two owners", ".4f")}
_TEXT = {
    "detection": ("detection", ".3f"),
    "detection_shuffled": ("of shuffled properties", ".3f"),
    "asked": ("neurons asked", ".0f"),
}


def write_table(config: "MoeXTableConfig", rows: Rows) -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    text = markdown(config, rows)
    save_table(config.folder, text, rows)
    _plot(rows, config)
    return text


def markdown(config: "MoeXTableConfig", rows: Rows) -> str:
    """Returns the table's page."""
    papers = {row.name: row.paper for row in config.rows}
    lines = [f"# {config.title or config.table}", "", f"Preset {config.preset}. {machine()}", ""]
    lines += ["## Othello", "", _about(config, "board") + " " + _BOARD_MEASURES, ""]
    lines += [*grid(_SHARED | _BOARD | _WORK, _part(rows, "board"), papers), ""]
    lines += ["## Stories", "", _about(config, "text") + " " + _TEXT_MEASURES, ""]
    lines += [*grid(_SHARED | _TEXT | _WORK, _part(rows, "text"), {}), ""]
    lines += [answer(claim, rows) for claim in config.claims]
    return "\n".join(lines).rstrip() + "\n"


_BOARD_MEASURES = (
    "Coverage: for each of 128 properties (a square with a disc of the player to move, or of the other one) the best "
    "F1 of any neuron, on average; that of shuffled labels is what neurons get by firing often. Reconstruction: F1 "
    "over the squares of further games, told from neurons that are right in 95 % of their firings. The law itself "
    "draws evenly from the legal moves. The paper's figures are loss, coverage and reconstruction on chess."
)
_TEXT_MEASURES = (
    "Coverage and reconstruction are of the state of the law that writes the stories: the place in the sentence, who "
    "is told of, the verb. Detection: a neuron is explained by the one known property, a word or a part of the state, "
    "that fits its firings best; by it tokens of further stories are told where it fires, 0.5 is chance. The paper "
    "lets language models write and use explanations, so that its figures do not compare."
)


def _part(rows: Rows, part: str) -> dict[str, dict[str, float]]:
    """Returns the rows with the figures of one part."""
    before = f"{part}/"
    return {
        row: {name.removeprefix(before): value for name, value in figures.items() if name.startswith(before)}
        for row, figures in rows.items()
    }


def _about(config: "MoeXTableConfig", part: str) -> str:
    run, size = getattr(config, part), config.size
    shape = run.scratch
    runs = f"means and standard errors of {size.seeds} runs" if size.seeds > 1 else "one run each"
    turns = f" Games are broken off after {size.turns} turns." if part == "board" and size.turns is not None else ""
    return (
        f"Models of {shape.layers} layers, width {shape.width}, with {shape.mlp_width} neurons at work on a token; "
        f"{getattr(size, part)} updates of {run.batch_size} rows of {run.length} tokens, {runs}.{turns} Neurons are "
        f"those of layer {config.layer} (from 0), measured on {size.texts} held-out texts and tested on as many more."
    )


def _plot(rows: Rows, config: "MoeXTableConfig") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row, figures in _part(rows, "board").items():
        if HELD_OUT in figures and "reconstruction" in figures:  # a control has no loss, a failed run nothing else
            axes.scatter(figures[HELD_OUT], figures["reconstruction"])
            axes.annotate(f" {row}", (figures[HELD_OUT], figures["reconstruction"]))
    axes.set_xlabel("held-out cross-entropy of games")
    axes.set_ylabel("reconstruction of the board, F1")
    figure.savefig(config.folder / "plot.png", dpi=120)
