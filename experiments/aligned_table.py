"""The table of grammar-aligned decoding (2405.21047): how near samples come to the model's law, given the grammar.

Languages are small enough for every text to be listed, as token sequences, so that the true law Q is known. Masking
alone and ASAp draw as many samples; after some numbers of them the divergence of what was drawn from Q is taken, in
nats, and the total variation. Finished grammars are kept.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from decoding.grammar.asap import Node, Sample, Trie
from experiments.kept import cell_key, keep, read_kept
from experiments.loading import Loader
from experiments.pages import save_table
from experiments.runtime import machine
from experiments.table_config import TableFrame
from experiments.train_pages import answer, grid
from experiments.train_table import TrainClaim
from models.errors import InputError

Figures = dict[str, float]
Text = tuple[int, ...]
MOST_TEXTS = 5000


@dataclasses.dataclass(frozen=True)
class AlignedGrammar:
    """A language: the texts that a regular expression matches, at most `MOST_TEXTS` token sequences."""

    name: str = "skewed"
    pattern: str = "00000|1[01]{4}"
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class AlignedSamples:
    """Samples of each side, by preset."""

    smoke: int = 20
    cpu: int = 400
    gpu: int = 2000


@dataclasses.dataclass(frozen=True)
class AlignedTableConfig(TableFrame):
    """The table."""

    type: Literal["grammar_aligned"] = "grammar_aligned"
    table: str = "grammar_aligned"
    model: str = "smollm2-135m-instruct"  # a registry name or a model folder
    prompt: str = "Write five random bits."
    grammars: tuple[AlignedGrammar, ...] = (AlignedGrammar(),)
    max_new_tokens: int = 8
    samples: AlignedSamples = AlignedSamples()
    claims: tuple[TrainClaim, ...] = ()  # rows are "GRAMMAR, masked" and "GRAMMAR, ASAp"
    seed: int = 0

    def __post_init__(self) -> None:
        rows = [f"{grammar.name}, {side}" for grammar in self.grammars for side in SIDES]
        self.check_rows(rows)
        self.check_claims(rows)


class Masked(Trie):
    """Plain constrained decoding: nothing is learned from what was sampled."""

    def _learn(self, path: list[Node], rows: list[Any]) -> None:
        path[-1].bound = 1.0


SIDES: dict[str, type[Trie]] = {"masked": Masked, "ASAp": Trie}


def true_law(trie: Trie) -> dict[Text, float]:
    """Returns every text of a trie's language with its share of the model's mass on the language.

    Raises InputError where there are more than `MOST_TEXTS`, or none that ends within the trie's room.
    """
    found: dict[Text, float] = {}

    def descend(text: list[int], mass: float) -> None:
        if len(found) > MOST_TEXTS:
            raise InputError(f"the language has more than {MOST_TEXTS} texts: take a smaller one")
        trie.matcher.reset()
        for token in text:
            trie.matcher.consume(token)
        tokens, law = trie.row(Node(), text)
        for token, chance in zip(tokens.tolist(), law.tolist(), strict=True):
            if token in trie.stops:
                found[(*text, token)] = mass * chance
            elif len(text) + 1 < trie.room:
                descend([*text, token], mass * chance)

    descend([], 1.0)
    total = math.fsum(found.values())
    if not total > 0:
        raise InputError("no text of the language ends within max_new_tokens: raise it")
    return {text: mass / total for text, mass in found.items()}


def distances(samples: Sequence[Sample], truth: Mapping[Text, float]) -> tuple[float, float]:
    """Returns (KL(drawn || truth) in nats, total variation) of accepted samples; (inf, 1) where there are none."""
    kept = Counter(tuple(sample.tokens) for sample in samples if sample.accepted)
    if not kept:
        return math.inf, 1.0
    drawn = {text: count / kept.total() for text, count in kept.items()}
    divergence = sum(share * math.log(share / max(truth.get(text, 0.0), 1e-300)) for text, share in drawn.items())
    return divergence, 0.5 * sum(abs(drawn.get(text, 0.0) - share) for text, share in truth.items())


def curves(new_trie: Callable[[type[Trie]], Trie], count: int, seed: int) -> dict[str, Figures]:
    """Returns {side: figures after `count` samples and after halves of that, and of the samples' own likelihood}."""
    truth = true_law(new_trie(Trie))
    found: dict[str, Figures] = {}
    for side, kind in SIDES.items():
        trie, rng = new_trie(kind), np.random.default_rng(seed)
        samples = [trie.sample(rng) for _ in range(count)]
        divergence, variation = distances(samples, truth)
        kept = [tuple(sample.tokens) for sample in samples if sample.accepted]
        halves = [count // 2**power for power in range(6) if count // 2**power]
        found[side] = {
            "kl": divergence,
            "tv": variation,
            "likelihood": float(np.mean([truth[text] for text in kept])) if kept else 0.0,
            "calls": sum(sample.calls for sample in samples) / count,
            "texts": float(len(truth)),
            **{f"kl/{some}": distances(samples[:some], truth)[0] for some in halves},
        }
    return found


def measure(config: AlignedTableConfig) -> dict[str, Figures]:
    """Returns {row: figures}, measuring what is not kept."""
    from decoding import grammar

    loader, count, rows = Loader("float32"), getattr(config.samples, config.preset), {}
    for language in config.grammars:
        shared = (config.model, config.prompt, config.max_new_tokens, config.seed, count)
        path, key = config.folder / "runs" / f"{language.name}.json", cell_key(language.pattern, shared)
        found = read_kept(path, key)
        if found is None:
            model, params, tokenizer = loader.model(config.model)
            vocabulary = grammar.Vocabulary.of(tokenizer, model.config.vocab_size)
            rule = grammar.regex(language.pattern, vocabulary)
            encode = tokenizer.encode_chat if tokenizer.chat_template else tokenizer.encode
            stops, room = tokenizer.stop_ids, config.max_new_tokens
            aligned = grammar.GrammarAligned(
                model, params, encode(config.prompt), rule, stop_tokens=stops, max_new_tokens=room
            )

            def new_trie(kind: type[Trie], rule=rule, aligned=aligned, stops=stops, room=room) -> Trie:
                return kind(rule.matcher(), aligned.trie.law, stops, room)

            found = {"figures": curves(new_trie, count, config.seed)}
            keep(path, key, **found)
            print(language.name, flush=True)
        rows |= {f"{language.name}, {side}": dict(figures) for side, figures in found["figures"].items()}
    return rows


_COLUMNS = {
    "kl": ("KL of samples from the law, nats", ".4f"),
    "tv": ("total variation", ".4f"),
    "likelihood": ("mean probability of a sample", ".4f"),
    "calls": ("model calls per sample", ".2f"),
    "texts": ("texts", ".0f"),
}


def write_table(config: AlignedTableConfig, rows: dict[str, Figures]) -> str:
    """Writes table.md, table.csv and plot.png to the config's folder and returns the Markdown."""
    from matplotlib.figure import Figure

    papers = {f"{own.name}, ASAp": own.paper for own in config.grammars}
    count = getattr(config.samples, config.preset)
    counts = sorted({int(key[3:]) for figures in rows.values() for key in figures if key.startswith("kl/")})
    lines = [
        *(f"# {config.title or config.table}", "", f"Preset {config.preset}, model {config.model}. {machine()}", ""),
        *(f"{count} samples of each row; the true law is known by listing every text.", ""),
        *(*grid(_COLUMNS, rows, papers), ""),
        *("KL of the first samples from the law, nats, by their number:", ""),
        *(*grid({f"kl/{some}": (f"{some}", ".4f") for some in counts}, rows, {}), ""),
        *(answer(claim, rows) for claim in config.claims),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    save_table(config.folder, text, rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, figures in rows.items():
        points = sorted((int(key[3:]), value) for key, value in figures.items() if key.startswith("kl/"))
        axes.plot(*zip(*points, strict=True), label=name, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("samples")
    axes.set_ylabel("KL of samples from the law, nats")
    axes.legend()
    figure.savefig(config.folder / "plot.png", dpi=120)
    return text
