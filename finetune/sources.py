"""Rows of files and of the hub's datasets, by way of the `datasets` library, as items to be encoded.

Files are read as a stream, without a copy in the library's cache; nothing here needs a connection but the hub itself.
"""

import dataclasses
import difflib
import glob
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from finetune.corpus import Example
from finetune.rows import Messages, Row
from models.errors import InputError, unknown_name

_READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}
Item = str | Example | Messages | Row  # a row is in tokens already
Placed = list[tuple[str, Item]]  # with where each came from, for messages


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns hold what: `messages` where it is set, else `prompt` and `completion`, else `text`.

    Attributes:
        text: plain text, all of which is learnt; longer ones are cut into pieces.
        prompt: what the model reads; prompts that are too long with their completions are left out.
        completion: what it learns to answer.
        messages: conversations, lists of maps with role and content; the assistant's turns are learnt.
        chat: whether prompt and completion become turns of the tokenizer's chat template.
    """

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise InputError(f"name both prompt and completion, or none: got {self.prompt!r} and {self.completion!r}")
        if self.messages is not None and self.prompt is not None:
            raise InputError(f"name messages ({self.messages!r}) or prompt ({self.prompt!r}), not both")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns to be read."""
        if self.messages is not None:
            return (self.messages,)
        return (self.text,) if self.prompt is None or self.completion is None else (self.prompt, self.completion)


@dataclasses.dataclass(frozen=True)
class FileData:
    """A file here: .jsonl, .json or .parquet, or .txt with texts between blank lines (their column is `text`).

    Attributes:
        path: the file; must be set.
        test_path: a file of the same columns to test on; None: part of the first.
        test_share: that part, of the rows; 0: no testing.
        columns: what is in it.
        limit: rows to read of each file, at most.
    """

    type: Literal["file"] = "file"
    path: Path | None = None
    test_path: Path | None = None
    test_share: float = 0.05
    columns: Columns = Columns()
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_amounts(self.test_share, self.limit)


@dataclasses.dataclass(frozen=True)
class HubData:
    """A dataset of the Hugging Face hub, or a folder that `datasets.load_dataset` reads.

    Attributes:
        name: its name, owner/name; must be set.
        subset: its configuration, where it has several.
        split: to train on.
        test_split: to test on; None: part of `split`.
        test_share: that part, of the rows; 0: no testing.
        columns: what is in it.
        limit: rows to read of each split, at most; no more are fetched, and nothing is kept for the next run.
    """

    type: Literal["hub"] = "hub"
    name: str = ""
    subset: str | None = None
    split: str = "train"
    test_split: str | None = None
    test_share: float = 0.05
    columns: Columns = Columns()
    limit: int | None = None

    def __post_init__(self) -> None:
        _check_amounts(self.test_share, self.limit)


def read_source(config: FileData | HubData) -> tuple[str, Placed, Placed | None]:
    """Returns (what to call the source, its items to train on, those to test on if the config names any).

    Raises:
        InputError: no such file, dataset, split or column, a source that cannot be read, no rows in it, or a row
            without the wanted text, named by its number.
    """
    if isinstance(config, FileData):
        if config.path is None:
            raise InputError("data.path is not set; name a .jsonl, .json, .parquet or .txt file")
        name, paths = str(config.path), (config.path, config.test_path)
        splits = [(str(path), _file(path)) for path in paths if path is not None]
    else:
        name, found = config.name, _hub(config)
        wanted = [split for split in (config.split, config.test_split) if split is not None]
        for split in wanted:
            if split not in found:
                raise unknown_name(f"split of {name}", split, found)
        splits = [(f"{name}, {split}", found[split]) for split in wanted]
    read = [_items(source, rows, config.columns, config.limit) for source, rows in splits]
    return name, read[0], read[1] if len(read) > 1 else None


def _check_amounts(test_share: float, limit: int | None) -> None:
    if not 0 <= test_share < 1:
        raise InputError(f"test_share must be from 0 up and below 1, got {test_share}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1 row (or null for all), got {limit}")


def _file(path: Path) -> Iterable[Mapping[str, Any]]:
    """Returns the rows of a file, read as they are asked for."""
    if not path.is_file():
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        raise InputError(f"no such file: {path}" + (f"; did you mean {path.parent / close[0]}?" if close else ""))
    if path.suffix.lower() not in _READERS:
        raise InputError(f"{path}: files of data end in {', '.join(_READERS)}, not {path.suffix!r}")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty")
    import datasets

    reader, options = _READERS[path.suffix.lower()]
    try:
        return datasets.load_dataset(
            reader, data_files=glob.escape(str(path)), split="train", streaming=True, **options
        )
    except Exception as error:  # the library lets through whatever its readers raise
        raise InputError(f"cannot read {path}: {error}") from error


def _hub(config: HubData) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """Returns the splits of a dataset."""
    if not config.name:
        raise InputError("data.name is not set; name a dataset of the hub, such as owner/name")
    if Path(config.name).is_file():
        raise InputError(f"{config.name} is a file here: read it with type: file and path: {config.name}")
    import datasets

    try:
        return datasets.load_dataset(config.name, config.subset, streaming=config.limit is not None)
    except Exception as error:  # of the hub, the network, the disk and each reader
        raise InputError(
            f"cannot load the dataset {config.name!r}: {error}; check the name and the connection, or take a file here "
            "(type: file) or generated data (type: generated)"
        ) from error


def _items(source: str, rows: Iterable[Mapping[str, Any]], columns: Columns, limit: int | None) -> Placed:
    """Returns the texts, examples or conversations of a split; texts without a word are left out."""
    items: Placed = []
    good, kind = (list, "list of messages") if columns.messages is not None else (str, "text")
    for number, row in enumerate(itertools.islice(_whole(source, rows), limit), 1):
        place = f"{source}, row {number}"
        for name in columns.wanted:
            if number == 1 and name not in row:
                raise unknown_name(f"column of {source}", name, row)
            if not isinstance(row.get(name), good):
                raise InputError(f"{place} has no {kind} in {name!r}: {dict(row)!r:.120}")
        values = [row[name] for name in columns.wanted]
        if len(values) == 2:
            items.append((place, Example(*values)))
        elif good is list or values[0].strip():
            items.append((place, values[0]))
    if not items:
        raise InputError(f"{source} has no rows to learn from")
    return items


def _whole(source: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows; what goes wrong in reading one becomes an InputError."""
    try:
        yield from rows
    except Exception as error:  # as above
        raise InputError(f"cannot read {source}: {error}") from error
