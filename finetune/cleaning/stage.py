"""What a stage of the cascade is, so that one runner serves all: summaries of shards, one decision, verdicts."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_WORD = re.compile(r"\w+")


class Verdict(NamedTuple):
    """What becomes of a text: its new form, or None where it is dropped, and why it is dropped."""

    text: str | None
    reason: str = ""


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: of its folder and its row of counts.
        settings: its config, to tell whether work that was kept is still good.
        apply: (texts of a shard, the shard's part of the decision) -> a verdict for each text.
        summarize: texts of a shard -> what the decision needs of them; None: the stage looks at one text at a time.
        decide: summaries of all shards, in order -> JSON values, one for each shard.
    """

    name: str
    settings: Any
    apply: Callable[[Sequence[str], Any], list[Verdict]]
    summarize: Callable[[Sequence[str]], Any] | None = None
    decide: Callable[[Sequence[Any]], list[Any]] | None = None


def words_of(text: str) -> list[str]:
    """Returns the words of a text, lower case, without punctuation: what copies are compared by."""
    return _WORD.findall(text.lower())
