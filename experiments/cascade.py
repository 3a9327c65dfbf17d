"""Runs the stages of `finetune.cleaning` over shards of JSON lines; a run that is killed goes on to the same files.

out/
  1-rules/NAME.jsonl         what is left of each shard behind the stage, lines as they were but for the text
  1-rules/NAME.jsonl.counts  texts and words in and out, reasons of those that were dropped
  2-near_copies/...          and what the stage decided (decision.json)
  corpus/                    the last stage's shards

Every file appears whole or not at all, and is kept under a key of all that it comes of: the shards' bytes, the settings
of its stage and of those before.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.kept import cell_key, keep, read_kept
from finetune.cleaning.stage import Stage, Verdict
from models.errors import InputError
from models.weights.whole import whole_file, whole_folder


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a stage did: texts and words in and out, how many texts it changed, and why texts were dropped."""

    stage: str
    texts_in: int = 0
    texts_out: int = 0
    words_in: int = 0
    words_out: int = 0
    changed: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Counts") -> "Counts":
        numbers = ("texts_in", "texts_out", "words_in", "words_out", "changed")
        sums = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return Counts(self.stage, **sums, dropped=dict(Counter(self.dropped) + Counter(other.dropped)))


class Shard(NamedTuple):
    """A shard before a stage: its name, where it lies, and a fingerprint of what is in it."""

    name: str
    path: Path
    key: str


def find_shards(source: Path) -> list[Shard]:
    """Returns the .jsonl files of a folder, by name, or the one file.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    paths = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    if not paths:
        raise InputError(f"{source} has no .jsonl files; a shard is a file of one JSON object a line")
    try:
        return [Shard(path.name, path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename}: {error.strerror}; wanted a .jsonl file, or a folder of them"
        ) from error


def read_records(path: Path, column: str) -> list[dict[str, Any]]:
    """Returns the objects of a shard; blank lines are passed over.

    Raises:
        InputError: a line that is not UTF-8, no JSON object, or without a text in `column`, named by its number.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:  # of both kinds
            raise InputError(f"{path}, line {number} is not a line of JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            raise InputError(f"{path}, line {number} has no text in {column!r}: {line.decode()!r:.120}")
        records.append(record)
    return records


def run_cascade(
    shards: Sequence[Shard], stages: Sequence[Stage], out: Path, column: str, say: Callable[[str], None] = print
) -> list[Counts]:
    """Runs the stages one after another, as far as their files are not there yet.

    Args:
        shards: of `find_shards`; texts that come first stay where the order decides.
        stages: in their order.
        out: the folder of the run.
        column: of the text.
        say: called with a line for each stage.

    Returns:
        The counts of each stage.

    Raises:
        InputError: a bad line, or a folder that cannot be written.
    """
    found = []
    try:
        for place, stage in enumerate(stages, 1):
            shards, counts = _run_stage(stage, shards, out / f"{place}-{stage.name}", column)
            found.append(counts)
            say(
                f"{stage.name:<12} {counts.texts_in:>8,} texts in, {counts.texts_out:>8,} out; "
                f"{counts.words_in:>10,} words in, {counts.words_out:>10,} out"
            )
        _publish(shards, out / "corpus")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or out}: {error.strerror}") from error
    return found


def _run_stage(stage: Stage, shards: Sequence[Shard], folder: Path, column: str) -> tuple[list[Shard], Counts]:
    """Returns (the shards behind the stage, its counts)."""
    folder.mkdir(parents=True, exist_ok=True)
    together = cell_key(stage.name, stage.settings, [shard.key for shard in shards], column)
    behind, counts, decision = [], Counts(stage.name), None
    for place, shard in enumerate(shards):
        key = together if stage.decide is not None else cell_key(stage.name, stage.settings, shard.key, column)
        key = cell_key(key, shard.name)
        path = folder / shard.name
        kept = read_kept(_counts_of(path), key)
        if kept is None or not path.is_file():
            if decision is None and stage.decide is not None:
                decision = _decide(stage, shards, folder / "decision.json", together, column)
            part = None if decision is None else decision[place]
            kept = {"counts": _apply(stage, part, shard, path, column)}
            keep(_counts_of(path), key, **kept)
        counts += Counts(**kept["counts"])
        behind.append(Shard(shard.name, path, key))
    return behind, counts


def _counts_of(path: Path) -> Path:
    return path.with_name(path.name + ".counts")


def _decide(stage: Stage, shards: Sequence[Shard], path: Path, key: str, column: str) -> list[Any]:
    kept = read_kept(path, key)
    if kept is None:
        summaries = [stage.summarize(_texts(read_records(shard.path, column), column)) for shard in shards]
        kept = {"shards": stage.decide(summaries)}
        keep(path, key, **kept)
    return kept["shards"]


def _texts(records: Sequence[dict[str, Any]], column: str) -> list[str]:
    return [record[column] for record in records]


def _apply(stage: Stage, decision: Any, shard: Shard, path: Path, column: str) -> dict[str, Any]:
    """Writes what is left of a shard; returns its counts as JSON values."""
    records = read_records(shard.path, column)
    verdicts = stage.apply(_texts(records, column), decision)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for record, verdict in zip(records, verdicts, strict=True):
            if verdict.text is not None:
                file.write(json.dumps({**record, column: verdict.text}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return dataclasses.asdict(_count(stage.name, _texts(records, column), verdicts))


def _count(name: str, texts: Sequence[str], verdicts: Sequence[Verdict]) -> Counts:
    left = [verdict.text for verdict in verdicts if verdict.text is not None]
    return Counts(
        name,
        len(texts),
        len(left),
        sum(len(text.split()) for text in texts),
        sum(len(text.split()) for text in left),
        sum(verdict.text not in (None, text) for text, verdict in zip(texts, verdicts, strict=True)),
        dict(Counter(verdict.reason for verdict in verdicts if verdict.text is None)),
    )


def _publish(shards: Sequence[Shard], folder: Path) -> None:
    """Copies the last shards to a folder that is whole or not there; done once for the same shards."""
    mark, key = ".made-of", cell_key([shard.key for shard in shards])
    if (folder / mark).is_file() and (folder / mark).read_text(encoding="utf-8") == key:
        return
    with whole_folder(folder, mark) as staging:
        for shard in shards:
            shutil.copyfile(shard.path, staging / shard.name)
        (staging / mark).write_text(key, encoding="utf-8")


def counts_page(counts: Sequence[Counts]) -> list[str]:
    """Returns the lines of a Markdown table: what went into each stage, what came out, and why texts were dropped."""
    lines = ["| stage | texts in | texts out | words in | words out | changed | dropped |", "|" + " --- |" * 7]
    for one in counts:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in sorted(one.dropped.items()))
        numbers = (one.texts_in, one.texts_out, one.words_in, one.words_out, one.changed)
        lines.append(f"| {one.stage} | {' | '.join(f'{number:,}' for number in numbers)} | {reasons} |")
    return lines
