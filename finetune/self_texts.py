"""Texts that a model has written itself, to train it or what drafts for it: a JSON Lines file that can be gone on with.

    {"format": 1, "base": {"name": ..., "content": ...}, "wanted": 960, "settings": {...}}
    {"index": 0, "split": "train", "prompt": [ids], "tokens": [ids], "loops": false}

A small model's greedy text often runs in circles. Such a text is cut where an 8-gram comes up for the third time, and
dropped where too little is left: repetitions are easy to guess, and would make every head look better than it is.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from finetune.adapters.saved import Base
from finetune.rows import Row, Rows, stack
from models.errors import InputError

_FORMAT = 1
_GRAM, _TIMES = 8, 3
SHORTEST = 24  # tokens of a text that runs in circles that must be left
SPLITS = ("train", "calibration", "test")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        index: its number.
        split: train, calibration or test.
        prompt: what it follows, token ids.
        tokens: what the model wrote, cut where it began to run in circles; none where the text was dropped.
        loops: whether it did.
    """

    index: int
    split: str
    prompt: list[int]
    tokens: list[int]
    loops: bool


class Plan(NamedTuple):
    """What a file is to hold: the model that writes, how many texts, and settings that decide what they are."""

    base: Base
    wanted: int
    settings: Mapping[str, Any]

    def line(self) -> str:
        """Returns the file's first line."""
        about = {"format": _FORMAT, "base": self.base._asdict(), "wanted": self.wanted, "settings": self.settings}
        return json.dumps(about)


def before_loop(tokens: Sequence[int]) -> int:
    """Returns how many tokens come before any 8 in a row stand there for the third time; all where none do."""
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(len(tokens) - _GRAM + 1):
        gram = tuple(tokens[start : start + _GRAM])
        seen[gram] += 1
        if seen[gram] == _TIMES:
            return start
    return len(tokens)


def filtered(index: int, split: str, prompt: Sequence[int], tokens: Sequence[int]) -> Text:
    """Returns a text, cut or emptied where it runs in circles."""
    kept = before_loop(tokens)
    loops = kept < len(tokens)
    return Text(index, split, list(prompt), list(tokens[: 0 if loops and kept < SHORTEST else kept]), loops)


@contextmanager
def texts_file(path: Path, plan: Plan) -> Iterator[tuple[set[int], TextIO]]:
    """Opens a file to be begun or gone on with: gives the numbers of the texts in it, and where to `append` to.

    A last line that was not finished is taken back.

    Raises:
        InputError: the file is of another model or of other settings, is damaged, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            content = file.read()
            if not content.endswith("\n"):
                whole = content[: content.rfind("\n") + 1]
                file.truncate(len(whole.encode()))
                content = whole
            if not content:
                print(plan.line(), file=file, flush=True)
            else:
                _check_same(path, content.split("\n", 1)[0], plan)
            yield {text.index for text in _texts(path, content.splitlines()[1:])}, file
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot write {path}: {error}") from error


def append(file: TextIO, texts: Iterable[Text]) -> None:
    """Adds texts to an open file."""
    file.write("".join(json.dumps(dataclasses.asdict(text)) + "\n" for text in texts))
    file.flush()


def read_texts(path: Path, base: Base | None) -> list[Text]:
    """Returns the texts of a finished file, by number, without those that were dropped.

    Args:
        path: the file.
        base: the model that must have written them; None: any may have.

    Raises:
        InputError: no such file, one of something else, one that another model wrote, or one that is cut short.
    """
    again = "python -m experiments.generate writes such files"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the texts {path}: {error}; {again}") from error
    about = _about(path, lines[0])
    wrote = Base(**about["base"])
    if base is not None and wrote.content != base.content:
        raise InputError(
            f"the texts in {path} were written by {wrote.name!r} (content {wrote.content[:12]}), not by {base.name!r} "
            f"(content {base.content[:12]}): generate others, training is on the model's own text"
        )
    cut = lines.pop() != ""
    texts = {text.index: text for text in _texts(path, lines[1:])}
    if cut or len(texts) != about["wanted"]:
        raise InputError(
            f"{path} is cut short: it has {len(texts)} of {about['wanted']} texts; run the same python -m "
            "experiments.generate again, which goes on"
        )
    return [texts[index] for index in sorted(texts) if texts[index].tokens]


def as_row(text: Text) -> Row:
    """Returns a prompt with its text; what the model wrote is to be predicted."""
    return Row(text.prompt + text.tokens, [False] * len(text.prompt) + [True] * len(text.tokens))


def as_rows(texts: Sequence[Text]) -> Rows:
    """Returns prompts with their texts as rows (`as_row`)."""
    return stack([as_row(text) for text in texts])


def fingerprint(texts: Sequence[Text]) -> str:
    """Returns a SHA-256 of texts."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(text) for text in texts]).encode()).hexdigest()


def _texts(path: Path, lines: Sequence[str]) -> list[Text]:
    found = []
    for number, line in enumerate(lines, 2):
        try:
            text = Text(**json.loads(line))
            if text.split not in SPLITS:
                raise ValueError(f"no such split: {text.split}")
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{number} is no text ({error}): {line:.80}; remove the file") from error
        found.append(text)
    return found


def _about(path: Path, line: str) -> dict[str, Any]:
    try:
        about = json.loads(line)
        if about["format"] != _FORMAT or not {"base", "wanted", "settings"} <= set(about):
            raise ValueError(f"format {about['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no texts of python -m experiments.generate ({error}): {line:.80}") from error
    return about


def _check_same(path: Path, line: str, plan: Plan) -> None:
    there, wanted = _about(path, line), json.loads(plan.line())
    for name in ("base", "wanted", "settings"):
        if there[name] != wanted[name]:
            raise InputError(
                f"{path} was begun with another {name}: {there[name]}, now {wanted[name]}; choose another folder, or "
                "set it back to go on"
            )
