"""Draft heads in files of their own: settings, values, accuracy, figures, and the model that they belong to."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from decoding.speculative.head_kinds import HEADS
from decoding.speculative.head_trees import Accuracy
from finetune.adapters.saved import Base
from models.errors import InputError, unknown_name
from models.head_file import read_head, write_head

_KIND = "draft_head"
_MAIN = "experiments.train_draft_head"


class SavedHead(NamedTuple):
    """A head as it was saved.

    Attributes:
        config: its settings (`decoding.speculative.head_kinds`).
        values: its parameters.
        accuracy: by offset and rank, on text that it was not trained on.
        figures: what was measured when it was saved.
        base: the model that it belongs to.
    """

    config: Any
    values: Any
    accuracy: Accuracy
    figures: dict[str, float]
    base: Base


def save_draft_head(path: Path, head: SavedHead) -> None:
    """Writes a head; raises InputError where the file cannot be written."""
    facts = {
        "config": dataclasses.asdict(head.config),
        "accuracy": head.accuracy,
        "figures": head.figures,
        "base": head.base._asdict(),
    }
    write_head(path, _KIND, head.values, {name: json.dumps(value) for name, value in facts.items()})


def load_draft_head(path: Path, base: Base | None, method: str | None = None) -> SavedHead:
    """Reads a head.

    Args:
        path: the file.
        base: the model that is to use it; None: whatever it belongs to.
        method: the kind that is wanted; None: any.

    Raises:
        InputError: no such file, a damaged one, a head of another model, or one of another kind.
    """
    values, facts = read_head(path, _KIND, _MAIN, f"--config configs/train/{method or 'medusa'}.yaml")
    try:
        about = {name: json.loads(facts[name]) for name in ("config", "accuracy", "figures", "base")}
        kind = about["config"]["type"]
        if kind not in HEADS:
            raise unknown_name("kind of head", kind, HEADS)
        config = pydantic.TypeAdapter(HEADS[kind].config).validate_python(about["config"])
        belongs = Base(**about["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged, or of another version: {error}") from error
    if base is not None and belongs.content != base.content:
        raise InputError(
            f"the head in {path} belongs to {belongs.name!r} (content {belongs.content[:12]}), not to {base.name!r} "
            f"(content {base.content[:12]}): load that model, or train a head for this one"
        )
    if method is not None and kind != method:
        raise InputError(f"{path} holds a head of {kind!r}, not of {method!r}: use --method {kind}")
    accuracy = tuple(tuple(row) for row in about["accuracy"])
    return SavedHead(config, values, accuracy, about["figures"], belongs)
