"""What the models of a training table write: open-ended continuations of held-out texts, and figures of them.

Every row of texts is a trained row's model with one way to choose tokens. Figures of a law (entropy, perplexity) are
measured over the held-out texts themselves, at the row's temperature; figures of texts over what was generated, without
the part that was read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.kept import cell_key, keep, read_kept
from finetune.data import TrainingData, read_data
from finetune.data_configs import DataConfig, StoriesData
from finetune.rows import Rows
from models.errors import InputError

if TYPE_CHECKING:
    from models.decoder import Decoder
    from models.weights.tokenizer import Tokenizer

Figures = dict[str, float]
Loaded = tuple["Decoder", Any, "Tokenizer"]
Tokens = list[list[int]]


@dataclasses.dataclass(frozen=True)
class TextRow:
    """A model and how it chooses tokens."""

    name: str = "greedy"
    of: str = "base"  # the trained row whose model writes; base: the model that all rows start from
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    sharp_as: str | None = None  # a row: sample at the temperature at which laws are as sharp as that row's model's
    paper: str = ""  # what the paper reports, in words and figures

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"row {self.name!r}: temperature must not be negative and top_p in (0, 1]")
        if self.sharp_as is not None and self.temperature:
            raise ValueError(f"row {self.name!r}: with sharp_as the temperature is found; leave temperature out")


@dataclasses.dataclass(frozen=True)
class Continuations:
    """What is continued, and for how long. Nothing ends a text early: all have the same length."""

    read: int = 32  # tokens of a held-out text that are read
    new_tokens: int = 96  # that are written
    batch_size: int = 25  # texts written together

    def __post_init__(self) -> None:
        if min(self.read, self.new_tokens, self.batch_size) < 1:
            raise ValueError("read, new_tokens and batch_size must be at least 1")


class TextMeasure:
    """Measures rows of texts by the models of one run of every trained row; figures are kept in a folder."""

    def __init__(
        self,
        settings: Continuations,
        data: DataConfig,
        length: int,
        contexts: int,
        load: Callable[[str], Loaded],
        folder: Path,
    ):
        """Plans what is measured; nothing is read yet.

        Args:
            settings: what is continued.
            data: what the rows were trained on.
            length: tokens of a training row.
            contexts: held-out texts that are continued, at most.
            load: from a trained row's name to its model.
            folder: where figures and texts go.
        """
        self._settings, self._data, self._length, self._contexts = settings, data, length, contexts
        self._load, self._folder = load, folder

    def __call__(self, row: TextRow, seed: int, runs: str) -> Figures:
        """Returns the figures of a row, measured or kept from before.

        Args:
            row: the row.
            seed: of the samples.
            runs: what tells these runs from others: figures of others are not kept.
        """
        path = self._folder / f"{row.name}-{seed}.json"
        key = cell_key(self._settings, self._data, self._length, self._contexts, row, seed, runs)
        kept = read_kept(path, key)
        if kept is not None:
            return kept["figures"]
        figures, texts = self._measure(row, seed)
        keep(path, key, figures=figures, texts=texts)
        return figures

    def _measure(self, row: TextRow, seed: int) -> tuple[Figures, list[str]]:
        """Returns (figures, the texts with what was read)."""
        from decoding.next_token_laws import law_figures
        from decoding.text_metrics import text_figures

        model, params, tokenizer = self._load(row.of)
        data = read_data(self._data, tokenizer, self._length)
        held_out, known = self._held_out(data), _lists(data.train)
        temperature = self._temperature(row, held_out)
        laws = law_figures(model, params, held_out, 1, (temperature or 1.0,))
        fit = law_figures(model, params, known[: self._contexts])
        written = self._write(row, temperature, seed, model, params, held_out)
        read = self._settings.read
        texts = [tokenizer.decode(text[:read] + new) for text, new in zip(held_out, written, strict=True)]
        figures = {
            "temperature": temperature,
            "entropy": float(laws.entropy[0]),
            "top_mass": float(laws.top_mass[0]),
            "perplexity": float(np.exp(laws.cross_entropy[0])),
            "fit": float(fit.cross_entropy[0]),
        }
        return figures | text_figures(written, known) | self._truth(texts), texts

    def _held_out(self, data: TrainingData) -> Tokens:
        read = self._settings.read
        texts = [text for text in _lists(data.test) if len(text) > read][: self._contexts]
        if not texts:
            raise InputError(f"no held-out text has more than the {read} tokens that are to be read: lower read")
        return texts

    def _temperature(self, row: TextRow, texts: Tokens) -> float:
        """Returns the row's temperature, found where it is to be as sharp as another row's model."""
        from decoding.next_token_laws import law_figures, match_entropy

        if row.sharp_as is None:
            return row.temperature
        model, params, _ = self._load(row.sharp_as)
        wanted = float(law_figures(model, params, texts).entropy[0])
        model, params, _ = self._load(row.of)
        return match_entropy(model, params, texts, wanted)

    def _write(
        self, row: TextRow, temperature: float, seed: int, model: "Decoder", params: Any, texts: Tokens
    ) -> Tokens:
        """Returns what a model writes behind the beginnings of texts."""
        from decoding import make_decode_fn

        settings = self._settings
        sampling: Mapping[str, float] = {"temperature": temperature, "top_p": row.top_p} if temperature else {}
        method = "sample" if temperature else "greedy"
        decode_fn = make_decode_fn(model, method, max_new_tokens=settings.new_tokens)
        written: Tokens = []
        for first in range(0, len(texts), settings.batch_size):
            batch = [text[: settings.read] for text in texts[first : first + settings.batch_size]]
            seeds = [seed * len(texts) + first + index for index in range(len(batch))]
            written += np.asarray(decode_fn(params, batch, seeds, **sampling).tokens).tolist()
        return written

    def _truth(self, texts: list[str]) -> Figures:
        """Returns what texts are worth under the law that wrote the training texts, where that is known."""
        from finetune.stories import truth

        if not isinstance(self._data, StoriesData) or len(self._data.domains) != 1:
            return {}
        return truth([text.split() for text in texts], self._settings.read, self._data.domains[0])


def _lists(rows: Rows) -> Tokens:
    return [part.tolist() for part in np.split(rows.tokens, rows.starts[1:-1])]
