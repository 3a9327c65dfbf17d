"""Tables of texts: what searches write beside greedy decoding and sampling, judged by varied words and right answers.

Every row writes a list of texts for each prompt: those that a search has found, or as many samples. Lists are judged by
how varied they are, by the best of their first k where questions have an answer, and by what another model (or, without
one, the same) thinks of each text behind its prompt. Finished rows are kept.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.decode_config import SamplingSettings
from experiments.isotropy import layer_isotropy
from experiments.kept import cell_key, keep, read_kept
from experiments.loading import Loader
from experiments.pages import save_table
from experiments.questions import read_questions
from experiments.table_config import TableFrame
from experiments.train_pages import answer, grid
from experiments.train_table import TrainClaim
from finetune.context_tasks import items, prompt

Figures = dict[str, Any]
_COLUMNS = {
    **{f"oracle_{k}": (f"right answer among {k}", ".3f") for k in (1, 2, 4, 8)},
    **{f"distinct_{n}": (f"distinct-{n}", ".3f") for n in (1, 2, 3, 4)},
    "diversity": ("diversity of a text", ".3f"),
    "coherence": ("coherence, nats per token", ".3f"),
    "divergence": ("divergence from samples, bits", ".3f"),
    "log_prob": ("log-probability of the first text", ".2f"),
    "tokens": ("tokens", ".1f"),
}


@dataclasses.dataclass(frozen=True)
class SearchRow:
    """A row: a method and how it is set; `texts` are drawn one by one where the method samples."""

    name: str = "greedy"
    method: str = "greedy"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sampling: SamplingSettings = SamplingSettings()
    texts: int = 1  # of a list; searches must return as many (num_return)
    paper: str = ""

    def __post_init__(self) -> None:
        if self.texts < 1 or self.options.get("num_return", self.texts) != self.texts:
            raise ValueError(
                f"row {self.name!r} must have at least 1 of texts, and num_return as many; got {self.texts} and "
                f"{self.options.get('num_return', self.texts)}"
            )


@dataclasses.dataclass(frozen=True)
class SearchSize:
    """How much is measured."""

    prompts: int = 24
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        if min(self.prompts, self.max_new_tokens) < 1:
            raise ValueError("prompts and max_new_tokens must be at least 1")


@dataclasses.dataclass(frozen=True)
class SearchPresets:
    """The sizes that a table can be run at."""

    smoke: SearchSize = SearchSize(2, 6)
    cpu: SearchSize = SearchSize()
    gpu: SearchSize = SearchSize(200, 128)


@dataclasses.dataclass(frozen=True)
class SearchTableConfig(TableFrame):
    """A table of texts."""

    type: Literal["search"] = "search"
    table: str = "diverse_beam"
    model: str = "smollm2-135m-instruct"  # a registry name or a model folder
    judge: str | None = None  # the model that coherence is measured with, which reads the text anew; None: the same
    source: Literal["facts", "questions"] = "facts"  # one-word facts with answers, or the first turns of `questions`
    questions: Path = Path("configs/prompts/spec_bench.jsonl")
    reference: str = ""  # the row that `divergence` is measured from; "": it is left out
    isotropy: bool = False  # also the isotropy of the model's layers on the texts of all rows
    stop: bool = True  # texts end at stop tokens
    rows: tuple[SearchRow, ...] = (SearchRow(),)
    claims: tuple[TrainClaim, ...] = ()
    presets: SearchPresets = SearchPresets()
    seed: int = 0

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        self.check_rows(names)
        if self.reference not in ("", *names):
            raise ValueError(f"reference must be a row of this table: {', '.join(names)}; got {self.reference!r}")
        self.check_claims(names)


def measure(config: SearchTableConfig) -> dict[str, Figures]:
    """Returns {row: figures}, measuring what is not kept; "isotropy" stands for the layers' figures."""
    loader, asked = Loader("float32"), _prompts(config)
    shared = (config.model, config.judge, config.source, config.size, config.seed, config.stop, asked)
    lists: dict[str, list[list[list[int]]]] = {}
    kept: dict[str, Figures] = {}
    for row in config.rows:
        path, key = config.folder / "runs" / f"{row.name}.json", cell_key(row, shared)
        found = read_kept(path, key)
        if found is None:
            written, log_probs = _write(config, loader, row, asked)
            found = {"texts": written, "figures": _judge(config, loader, asked, written, log_probs)}
            keep(path, key, **found)
            print(row.name, flush=True)
        lists[row.name], kept[row.name] = found["texts"], dict(found["figures"])
    if config.reference:
        from decoding.text_metrics import unigram_divergence

        flat = {name: [text for texts in own for text in texts] for name, own in lists.items()}
        for name, figures in kept.items():
            figures["divergence"] = unigram_divergence(flat[name], flat[config.reference])
    if config.isotropy:
        path, key = config.folder / "runs" / "isotropy.json", cell_key(config.rows, shared)
        found = read_kept(path, key)
        if found is None:
            model, params, _ = loader.model(config.model)
            texts = [text for own in lists.values() for some in own[:8] for text in some[:1] if len(text) > 1]
            found = {"figures": layer_isotropy(model, params, texts)}
            keep(path, key, **found)
        kept["isotropy"] = dict(found["figures"])
    return kept


def _prompts(config: SearchTableConfig) -> list[tuple[Any, str]]:
    """Returns (a conversation, the answer that is right; "" where there is none) for each prompt."""
    count = config.size.prompts
    if config.source == "questions":
        asked = read_questions(config.questions, max(1, math.ceil(count / 4)))
        return [([{"role": "user", "content": q.turns[0]}], "") for q in asked][:count]
    made = list({item.query: item for item in items(("capitals", "opposites", "languages", "next"), 1, 0)}.values())
    chosen = [made[int(place)] for place in np.linspace(0, len(made) - 1, min(count, len(made)))]
    return [(prompt(item, None, with_context=False), item.known) for item in chosen]


def _ids(tokenizer: Any, messages: Any) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n".join(turn["content"] for turn in messages) + "\n")
    return tokenizer.encode_chat(messages)


def _write(config: SearchTableConfig, loader: Loader, row: SearchRow, asked: Any) -> tuple[Any, Any]:
    """Returns lists of texts for each prompt, best first, and log-probabilities of the first ones (nan: not known)."""
    size = config.size.max_new_tokens
    fn, params, tokenizer = loader.decode_fn(
        config.model, row.method, row.options, draft=None, head=None, max_new_tokens=size
    )
    if not config.stop:
        fn = type(fn)(dataclasses.replace(fn.plan, stop_tokens=()), fn.settings)
    sampling = {name: value for name, value in dataclasses.asdict(row.sampling).items() if value is not None}
    written, log_probs = [], []
    for index, (messages, _) in enumerate(asked):
        ids = _ids(tokenizer, messages)
        seeds = [(config.seed * 7919 + index * row.texts + draw) % 2**32 for draw in range(row.texts)]
        searched = "num_return" in row.options
        out = fn(params, [ids] if searched else [ids] * row.texts, seeds[0] if searched else seeds, **sampling)
        source = (out.found.tokens[0], out.found.lengths[0]) if searched else (out.tokens, out.lengths)
        texts = zip(np.asarray(source[0]).tolist(), np.asarray(source[1]).tolist(), strict=True)
        written.append([text[:length] for text, length in texts if length])
        log_probs.append(float(out.found.log_probs[0, 0]) if out.found is not None else math.nan)
    return written, log_probs


def _judge(config: SearchTableConfig, loader: Loader, asked: Any, written: Any, log_probs: Any) -> Figures:
    """Returns the figures of a row."""
    from decoding.next_token_laws import law_figures
    from decoding.text_metrics import distinct_n, diversity

    tokenizer = loader.model(config.model)[2]
    figures: Figures = {
        **{f"distinct_{n}": float(np.nanmean([distinct_n(texts, n) for texts in written])) for n in (1, 2, 3, 4)},
        "diversity": diversity([text for texts in written for text in texts]),
        "tokens": float(np.mean([len(text) for texts in written for text in texts])),
    }
    words = [[tokenizer.decode(text).strip() for text in texts] for texts in written]
    if all(right for _, right in asked):
        for k in (1, 2, 4, 8):
            hit = [
                any(word.startswith(right) for word in own[:k]) for own, (_, right) in zip(words, asked, strict=True)
            ]
            if k == 1 or max(map(len, words)) >= k:
                share = float(np.mean(hit))
                figures |= {f"oracle_{k}": share, f"oracle_{k}/error": (share * (1 - share) / len(hit)) ** 0.5}
    if not any(map(math.isnan, log_probs)):
        figures["log_prob"] = float(np.mean(log_probs))
    model, params, judge = loader.model(config.judge or config.model)
    texts, starts = [], []
    for (messages, _), own in zip(asked, words, strict=True):
        before = _ids(judge, messages)
        texts.append(before + judge.encode(own[0] if own else "", add_special=False))
        starts.append(len(before))
    if any(len(text) > start for text, start in zip(texts, starts, strict=True)):
        figures["coherence"] = -float(law_figures(model, params, texts, starts).cross_entropy[0])
    return {name: value for name, value in figures.items() if not (isinstance(value, float) and math.isnan(value))}


def write_table(config: SearchTableConfig, measured: dict[str, Figures]) -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    from matplotlib.figure import Figure

    from experiments.runtime import machine

    layers = measured.get("isotropy", {})
    rows = {name: figures for name, figures in measured.items() if name != "isotropy"}
    lines = [
        f"# {config.title or config.table}",
        "",
        f"Preset {config.preset}: {config.size.prompts} prompts, {config.size.max_new_tokens} new tokens at most, "
        f"model {config.model}, coherence by {config.judge or 'the model itself'}. {machine()}",
        *("", *grid(_COLUMNS, rows, {row.name: row.paper for row in config.rows}), ""),
    ]
    if layers:
        lines += ["Isotropy behind each layer, and of what the head reads:", "", "| layer | raw | mean removed |"]
        lines += ["| --- | --- | --- |"]
        lines += [f"| {name} | {own['raw']:.3f} | {own['centred']:.3f} |" for name, own in layers.items()] + [""]
    text = "\n".join([*lines, *(answer(claim, rows, config.size.prompts) for claim in config.claims)]).rstrip() + "\n"
    save_table(config.folder, text, rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, figures in rows.items():
        axes.scatter(figures["distinct_2"], figures.get("oracle_8", figures.get("coherence", 0.0)), label=name)
    axes.set_xlabel("distinct-2")
    axes.set_ylabel("right answer among 8" if config.source == "facts" else "coherence")
    axes.legend()
    figure.savefig(config.folder / "plot.png", dpi=120)
    return text
