"""A measured table as Markdown, CSV and a plot, with the machine and the versions that it was measured with."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cells import Cell, total
from experiments.head_pages import head_section
from experiments.pages import save_table
from experiments.questions import Question

if TYPE_CHECKING:
    from experiments.method_table import TableConfig

ALL = "all"
SECTIONS = {
    "mat": "MAT (new tokens per step)",
    "speedup": "Speed over plain, same run",
    "break_even": "Break-even MAT: a step's time over a plain step's",
    "tokens_per_second": "New tokens per second of prompt and decoding",
    "correct": "Share of right answers",
    "agreement": "Share of plain decoding's text before the first other token",
}
TOTALS = {
    "tokens_per_second": "tokens/s",
    "speedup": "speedup",
    "mat": "MAT",
    "break_even": "break-even MAT",
    "acceptance": "accepted of drafted",
    "by_target": "written by target",
    "same": "same text",
    "correct": "right answers",
    "target_calls": "target calls",
    "draft_calls": "draft calls",
}
Cells = Mapping[tuple[str, str], Cell]


def write_table(config: "TableConfig", cells: Cells, questions: Mapping[str, Sequence[Question]]) -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    summed = {
        **cells,
        **{(row.name, ALL): total([cells[row.name, task] for task in questions]) for row in config.chosen},
    }
    measures = {key: measures_of(cell, summed["plain", key[1]]) for key, cell in summed.items()}
    text = markdown(config, measures, questions, sorted({cell.machine for cell in cells.values()}))
    save_table(config.folder, text, measures, ("row", "task"))
    _plot(config, measures, config.folder / "plot.png")
    return text


def measures_of(cell: Cell, plain: Cell) -> dict[str, float]:
    """Returns a cell's figures.

    mat is new tokens per step, extra those but for the one that plain decoding has too. speedup compares tokens per
    second of prompt and decoding with plain decoding's in the same run. break_even is a step's time over a plain
    step's: what MAT must exceed for decoding to be faster than plain. same is the share of turns whose token ids equal
    plain decoding's, agreement the share of its tokens up to the first one that is another. by_target is the share of
    new tokens that the target itself wrote, correct the share of right replies, where replies are scored.
    """
    plain_seconds = cell.plain_prefill_seconds + cell.plain_decode_seconds
    turns = list(zip(cell.tokens, plain.tokens, strict=True))
    same, agreed = sum(ours == theirs for ours, theirs in turns), sum(_common(*turn) for turn in turns)
    return {
        "mat": cell.mat,
        "extra": cell.mat - 1,
        "tokens_per_second": cell.tokens_per_second,
        "speedup": cell.tokens_per_second * plain_seconds / cell.plain_tokens,
        "break_even": (cell.decode_seconds / cell.steps) / (cell.plain_decode_seconds / cell.plain_steps),
        "same": same / len(plain.tokens),
        "agreement": agreed / plain.emitted,
        "acceptance": cell.accepted / cell.drafted if cell.drafted else 0.0,
        "by_target": (cell.emitted - cell.accepted) / cell.emitted,
        **({"correct": cell.correct / cell.scored, "scored": cell.scored} if cell.scored else {}),
        "target_calls": cell.target_calls,
        "draft_calls": cell.draft_calls,
        "new_tokens": cell.emitted,
    }


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Returns how many tokens two texts begin with alike."""
    differs = (place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    return next(differs, min(len(ours), len(theirs)))


def markdown(
    config: "TableConfig",
    measures: Mapping[tuple[str, str], Mapping[str, float]],
    questions: Any,
    machines: Sequence[str],
) -> str:
    """Returns the table's page; `machines` are those that its cells were measured on."""
    columns = [*questions, ALL]
    lines = [f"# {config.title or config.table}", "", _setting(config, questions), "", *machines, ""]
    known = measures["plain", ALL]
    for measure, title in SECTIONS.items():
        if len({measures[row.name, ALL].get(measure) for row in config.chosen}) == 1 < len(config.chosen):
            continue  # it tells no row from another
        lines += [f"## {title}", ""]
        lines += [f"| row | {' | '.join(columns)} | paper |", f"|{' --- |' * (len(columns) + 2)}"]
        for row in config.chosen:
            figures = [f"{measures[row.name, column][measure]:.2f}" for column in columns]
            lines.append(f"| {row.name} | {' | '.join(figures)} | {row.paper} |")
        lines.append("")
    shown = {measure: title for measure, title in TOTALS.items() if measure in known}
    lines += ["## All tasks", "", f"| row | {' | '.join(shown.values())} |", f"|{' --- |' * (len(shown) + 1)}"]
    for row in config.chosen:
        figures = [_figure(measures[row.name, ALL][measure]) for measure in shown]
        lines.append(f"| {row.name} | {' | '.join(figures)} |")
    lines += head_section(config.chosen)
    lines += ["", "Break-even MAT is a step's time over a plain step's: decoding is faster than plain above it.", ""]
    lines += [_answer(claim, measures) for claim in config.claims]
    return "\n".join(lines).rstrip() + "\n"


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _setting(config: "TableConfig", questions: Mapping[str, Sequence[Question]]) -> str:
    count, most = sum(map(len, questions.values())), max(map(len, questions.values()))
    source = "written by code" if config.generate else f"of {config.questions.name}"
    draft = f", drafts by {config.draft}" if config.draft else ""
    return (
        f"{config.model}{draft}; preset {config.preset}: {count} questions {source} "
        f"({most} per task at most), {config.size.max_new_tokens} new tokens per turn, batch 1."
        + (" Each prompt is read densely, once for all rows." if config.long_prompts else "")
    )


def verdict(gap: float, error: float = 0.0) -> str:
    """Returns what a difference says of a claim that it is above 0, given its standard error (0: it has none)."""
    if abs(gap) < 2 * error:
        return "within the noise"
    return "reproduced" if gap > 0 else "not reproduced"


def share_error(share: float, count: float) -> float:
    """Returns the standard error of a share of `count` trials, one right and one wrong trial added: never 0."""
    share = (share * count + 1) / (count + 2)
    return (share * (1 - share) / count) ** 0.5


def _answer(claim: Any, measures: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    rows = [measures.get((row, ALL), {}) for row in (claim.row, claim.than)]
    if any(claim.measure not in row for row in rows):
        return f"- {claim.text}: **not measured** here."
    ours, theirs = (row[claim.measure] for row in rows)
    error = 0.0
    if claim.measure == "correct":
        errors = [share_error(row["correct"], row["scored"]) for row in rows]
        error = math.hypot(errors[0], claim.factor * errors[1])
    bound = "" if claim.factor == 1 else f", to be above {claim.factor:g} times it"
    found = verdict(ours - claim.factor * theirs, error)
    return f"- {claim.text}: **{found}** here ({claim.row} {ours:.2f}, {claim.than} {theirs:.2f}{bound})."


def _plot(config: "TableConfig", measures: Mapping[tuple[str, str], Mapping[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = [row.name for row in config.chosen]
    first = ("mat", "MAT")
    if len({measures[name, ALL]["mat"] for name in names}) == 1 and "correct" in measures["plain", ALL]:
        first = ("correct", "right answers")  # all take one token per step
    figure = Figure(figsize=(7, 0.45 * len(names) + 1.2), layout="constrained")
    for axes, (measure, title) in zip(
        figure.subplots(1, 2, sharey=True), (first, ("speedup", "speed over plain")), strict=True
    ):
        values = [measures[name, ALL][measure] for name in names]
        axes.barh(names, values)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(title)
        for place, value in enumerate(values):
            axes.text(value, place, f" {value:.2f}", va="center")
        axes.margins(x=0.2)
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
