"""Yi's table as Markdown, CSV and a plot."""

from typing import TYPE_CHECKING

from experiments.cascade import counts_page
from experiments.pages import save_table
from experiments.runtime import machine
from experiments.train_pages import HELD_OUT, answer, grid

if TYPE_CHECKING:
    from experiments.yi_table import Measured, YiTableConfig

_DEPTH = {HELD_OUT: ("held-out cross-entropy", ".4f"), "size/trainable": ("parameters", ",.0f")}


def write_table(config: "YiTableConfig", measured: "Measured") -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    text = markdown(config, measured)
    counts = {one.stage: {name: getattr(one, name) for name in _COUNTED} for one in measured.counts}
    save_table(config.folder, text, {**measured.depth, **measured.context, **counts})
    _plot(config, measured)
    return text


_COUNTED = ("texts_in", "texts_out", "words_in", "words_out", "changed")


def markdown(config: "YiTableConfig", measured: "Measured") -> str:
    """Returns the table's page."""
    papers = {row.name: row.paper for part in (config.depth, config.context) for row in part.rows}
    words = {f"recall/{words}": (f"{words} words", ".3f") for words in config.recall.words}
    cosines = " ".join(f"{value:.3f}" for value in measured.cosines)
    deeper, longer = config.part("depth"), config.part("context")
    stages = [one.stage for one in measured.counts]
    lines = [
        *(f"# {config.title or config.table}", "", f"Preset {config.preset}. {machine()}", ""),
        *("## Deeper models", "", _about(deeper), "", *grid(_DEPTH, measured.depth, papers), ""),
        *(f"Cosines of what enters and what leaves each layer of the base: {cosines}.", ""),
        *("## Longer contexts", "", _about(longer) + " " + _asked(config), ""),
        *(*grid({**words, HELD_OUT: _DEPTH[HELD_OUT]}, measured.context, papers), ""),
        *("## The cascade", "", *counts_page(measured.counts), ""),
        *(
            "Texts by their planted fault, at first and behind each stage; of a text and its copies any one may stay:",
            "",
        ),
        *(f"| fault | at first | {' | '.join(stages)} |", "|" + " --- |" * (len(stages) + 2)),
        *(f"| {kind} | {' | '.join(map(str, left))} |" for kind, left in measured.faults.items()),
        "",
        *(answer(claim, {**measured.depth, **measured.context}) for claim in config.claims),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _about(part) -> str:
    shape, size = part.start.scratch if part.start is not None else None, part.size
    start = f"a new model of {shape.layers} layers, width {shape.width}" if shape is not None else part.run.model
    more = f", trained for {size.base_steps} updates on {part.start.length} tokens a row" if shape is not None else ""
    return (
        f"Every row starts from {start}{more}, grows it, and makes {size.steps} updates of {part.run.batch_size} rows "
        f"of {part.run.length} tokens; a row called at first is the same before them."
    )


def _asked(config: "YiTableConfig") -> str:
    grid, examples = config.recall, config.part("context").size.examples
    return (
        f"Columns of words: the share of facts named right, of {grid.facts} in a text of so many words, at "
        f"{len(grid.depths)} depths ({examples} texts or somewhat more). One of the text's facts at random is right "
        f"{1 / grid.facts:.3f} of the time: a base that is no better at the length it was trained on has not learnt to "
        "recall, and nothing follows for longer texts."
    )


def _plot(config: "YiTableConfig", measured: "Measured") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row, figures in measured.context.items():
        axes.plot(
            config.recall.words, [figures[f"recall/{words}"] for words in config.recall.words], label=row, marker="o"
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("words of the text")
    axes.set_ylabel("facts named right")
    axes.legend()
    figure.savefig(config.folder / "plot.png", dpi=120)
