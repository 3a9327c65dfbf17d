"""The rows of a table while it is measured: each method on the table's model or its own, made when first needed."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cells import Row, longest_prompt
from experiments.loading import Loader
from experiments.questions import Question
from experiments.timed import SharedPrompts
from models.errors import InputError

if TYPE_CHECKING:
    from experiments.method_table import TableConfig, TableRow


class Rows:
    """Methods with caches of one size for all tasks; with the config's `long_prompts` of one size for each task, and
    with prompts that are read once for all rows of a task.
    """

    def __init__(
        self,
        config: "TableConfig",
        questions: Mapping[str, Sequence[Question]],
        corpora: Mapping[str, Sequence[Question]],
    ):
        """Makes nothing yet; `questions` are those of each task, `corpora` those that a row has replies to at first."""
        self.config, self.questions, self.corpora, self.loader = config, questions, corpora, Loader(config.dtype)
        self._rows: dict[str, Row] = {}
        self._cells: dict[str, Path] = {}  # each row's last one
        self._task, self._longest = "", 0
        self._shared = SharedPrompts() if config.long_prompts else None

    def passed(self, row: "TableRow", path: Path, measured: bool) -> None:
        """Notes a row's last cell; one that was kept is where the row goes on from."""
        self._cells[row.name] = path
        if row.name in self._rows and not measured:
            self._rows[row.name].take_warm(path)

    def ready(self, row: "TableRow", task: str) -> Row:
        """Returns a row for a task, with what it has learned up to its last cell."""
        self._turn_to(task)
        if row.name not in self._rows:
            self._rows[row.name] = self._made(row)
            if row.name in self._cells:
                self._rows[row.name].take_warm(self._cells[row.name])
            elif row.corpus:
                self._rows[row.name].learn(self.loader, self.config.model, self.corpora[row.name])
        return self._rows[row.name]

    def _turn_to(self, task: str) -> None:
        if task == self._task or (self._longest and self._shared is None):
            return
        asked = [q for own in self.questions.values() for q in own] if self._shared is None else self.questions[task]
        tokenizer = self.loader.model(self.config.model)[2]
        longest = longest_prompt(asked, tokenizer, self.config.size.max_new_tokens)
        if longest != self._longest:
            self._rows.clear()
        if self._shared is not None:
            self._shared.forget()
        self._task, self._longest = task, longest

    def _made(self, row: "TableRow") -> Row:
        from decoding import DecodeFn

        config = self.config
        if row.draft and config.draft is None:
            raise InputError(f"row {row.name!r} drafts with a second model: name it in draft")
        decode_fn, params, tokenizer = self.loader.decode_fn(
            config.model if row.model is None else str(row.model),
            row.method,
            row.options,
            draft=config.draft if row.draft else None,
            head=row.head,
            max_new_tokens=config.size.max_new_tokens,
            context=self._longest,
        )
        slots = decode_fn.plan.num_slots(self._longest)
        decode_fn = DecodeFn(dataclasses.replace(decode_fn.plan, cache_slots=slots), decode_fn.settings)
        sampling = {name: value for name, value in dataclasses.asdict(row.sampling).items() if value is not None}
        return Row(tokenizer, decode_fn, params, sampling, row.retrieval, self._shared)
