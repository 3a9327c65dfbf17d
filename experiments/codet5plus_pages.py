"""CodeT5+'s table as Markdown, CSV and a plot."""

from typing import TYPE_CHECKING

from experiments.pages import save_table
from experiments.runtime import machine
from experiments.train_pages import Rows, answer, grid

if TYPE_CHECKING:
    from experiments.codet5plus_table import CodeT5PlusTableConfig

COLUMNS = {  # measure -> (title, format)
    "mrr": ("MRR", ".3f"),
    "recall": ("first place", ".3f"),
    "reranked/mrr": ("MRR, ranked again", ".3f"),
    "reranked/recall": ("first place, ranked again", ".3f"),
    "cross_entropy": ("cross-entropy of the function", ".4f"),
    "exact": ("functions written exactly", ".3f"),
    "completed": ("lines gone on with, behind the first stage", ".3f"),
    "second/completed": ("behind both", ".3f"),
}


def write_table(config: "CodeT5PlusTableConfig", rows: Rows) -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    text = markdown(config, rows)
    save_table(config.folder, text, rows)
    _plot(config, rows)
    return text


def markdown(config: "CodeT5PlusTableConfig", rows: Rows) -> str:
    """Returns the table's page."""
    size, first, second = config.size, config.first, config.second
    shape = first.scratch
    start = first.model
    if shape is not None:
        start = f"a new model of {shape.encoder_layers} + {shape.layers} layers, width {shape.width}"
    lines = [
        *(f"# {config.title or config.table}", "", f"Preset {config.preset}. {machine()}", ""),
        f"Every row starts from {start}, and makes {size.first_steps} updates of {first.batch_size} functions "
        f"({', '.join(first.objective.losses)}), then {size.second_steps} of {second.batch_size} pairs "
        f"({', '.join(second.objective.losses)}), but for the losses that it leaves out. Of {size.pairs} held-out "
        f"pairs each text is to find its function; the head that matches ranks the {config.top} most alike again. "
        f"{size.answers} functions are written, and as many gone on with by the decoder alone, greedily.",
        *("", *grid(COLUMNS, rows, {row.name: row.paper for row in config.rows}), ""),
        *(answer(claim, rows) for claim in config.claims),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _plot(config: "CodeT5PlusTableConfig", rows: Rows) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    shown = ("mrr", "reranked/mrr", "completed")
    for axes, measure in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        axes.barh(list(rows), [figures.get(measure, 0.0) for figures in rows.values()])
        axes.set_title(COLUMNS[measure][0])
        axes.invert_yaxis()
    figure.savefig(config.folder / "plot.png", dpi=120)
