"""The knob's table as Markdown, CSV and a plot."""

from typing import TYPE_CHECKING, Any

from experiments.pages import save_table
from experiments.runtime import machine
from experiments.tables import share_error, verdict

if TYPE_CHECKING:
    from experiments.knob_config import KnobClaim, KnobTableConfig
    from experiments.knob_table import Measured

_COLUMNS = {
    "use": "context used",
    "ignore": "context ignored",
    "pairs": "both",
    "turned": "answers turned",
    "turned_random": "by a random direction",
    "turned_means": "by the difference of means",
    "turned_whole": "by the whole stream",
    "count": "of answers",
    "auc": "AUC of h u",
    "memory_use": "memory, knob at use",
    "memory_ignore": "memory, knob at ignore",
}


def write_table(config: "KnobTableConfig", measured: "Measured") -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    text = markdown(config, measured)
    save_table(config.folder, text, measured.rows)
    _plot(config, measured)
    return text


def markdown(config: "KnobTableConfig", measured: "Measured") -> str:
    """Returns the table's page."""
    chosen = measured.chosen
    lines = [
        *(f"# {config.title or config.table}", "", f"Preset {config.preset}, model {config.model}. {machine()}", ""),
        f"Shares of {measured.rows['tuned']['items']} held-out items. Rows untuned and tuned are told what to go by; "
        "directions are exchanged between the two prompts of a pair in the tuned model; rows steered are told nothing.",
        "",
        "| row | " + " | ".join(_COLUMNS.values()) + " | paper |",
        "|" + " --- |" * (len(_COLUMNS) + 2),
        *(
            f"| {row} | {' | '.join(_cell(figures.get(name)) for name in _COLUMNS)} | {config.paper.get(row, '')} |"
            for row, figures in measured.rows.items()
        ),
        "",
        f"Chosen: layer {chosen['layer']}, strength {chosen['use']:.3g} for the context and {chosen['ignore']:.3g} "
        f"against it; h u has a deviation of {chosen['deviation']:.3g}.",
        "",
        "| answers patched | layers | and | reached | patched runs | paper |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {found['start']} to {found['stop'] - 1} | {', '.join(map(str, found['more'])) or 'none'} | "
            f"{'yes' if found['reached'] else 'no'} | {found['runs']} | {config.paper.get(name, '')} |"
            for name, found in measured.searches.items()
        ),
        "",
        *(answer(claim, measured.rows, chosen["layer"]) for claim in config.claims),
    ]
    return "\n".join(lines).rstrip() + "\n"


def answer(claim: "KnobClaim", rows: dict[str, dict[str, Any]], layer: int) -> str:
    """Returns a claim with what was found; `direction` stands for the layer that was chosen on what was trained on."""
    figures = rows.get(f"direction, layer {layer}" if claim.row == "direction" else claim.row, {})
    if claim.measure not in figures:
        return f"- {claim.text}: **not measured** here."
    value, count = figures[claim.measure], figures.get("count", figures.get("items", 0))
    found = verdict(value - claim.least, share_error(value, count) if count else 0.0)
    return f"- {claim.text}: **{found}** here ({value:.3f}, wanted {claim.least:.3f} or more)."


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value}" if isinstance(value, int) else f"{value:.3f}"


def _plot(config: "KnobTableConfig", measured: "Measured") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    found = {
        int(row.rsplit(" ", 1)[1]): figures for row, figures in measured.rows.items() if row.startswith("direction")
    }
    for name in ("turned", "turned_random", "turned_means", "turned_whole"):
        axes.plot(list(found), [figures[name] for figures in found.values()], label=_COLUMNS[name], marker="o")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of answers turned")
    axes.legend()
    figure.savefig(config.folder / "plot.png", dpi=120)
