"""Measures what a grammar costs: seconds per token with one, over those without, in the same run. Started by
`experiments.bench`.

One loop (`constrained`) decodes the same prompts without a grammar, with one whose table is on the device, and with one
that asks the parsing engine on the host at each step. Grammars are such that texts go on for as long as is measured.
Medians of repeats in turn; reading prompts and compiling are left out.

The last line printed is one JSON object; the same figures go to a page that `experiments.results` takes up.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any, Literal

from experiments.config import save_page
from experiments.loading import Loader
from experiments.runtime import machine, setup_runtime
from experiments.timed import TimedDecode, alternate
from models.errors import InputError

_LANGUAGES = ("regex", "lark", "json_schema")


@dataclasses.dataclass(frozen=True)
class GrammarSide:
    """A grammar that is timed."""

    name: str = "table"
    language: str = "regex"  # regex, lark or json_schema
    source: str = "[a-zA-Z ,.]{400}"
    most: float = 0.03  # what it may add to a token's time, as a share of that without a grammar

    def __post_init__(self) -> None:
        if self.language not in _LANGUAGES:
            raise ValueError(f"language must be one of {', '.join(_LANGUAGES)}, got {self.language!r}")


@dataclasses.dataclass(frozen=True)
class ConstrainedBenchConfig:
    """One benchmark of constrained decoding."""

    type: Literal["constrained"] = "constrained"
    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    prompts: tuple[str, ...] = ("Write a list of animals.",)  # decoded together, as one batch
    grammars: tuple[GrammarSide, ...] = (GrammarSide(),)
    max_new_tokens: int = 64  # per prompt
    repeats: int = 7  # timed, after one that is not counted
    out: Path = Path("results/constrained_bench/cpu")

    def __post_init__(self) -> None:
        if min(self.repeats, self.max_new_tokens, len(self.prompts), len(self.grammars)) < 1:
            raise ValueError("repeats and max_new_tokens must be at least 1, and there must be a prompt and a grammar")


def bench_constrained(config: ConstrainedBenchConfig) -> None:
    """Loads the model, times every side in turn, prints the figures and writes the page."""
    setup_runtime()
    from decoding import grammar

    loader = Loader("float32")
    fn, params, tokenizer = loader.decode_fn(
        config.model, "constrained", {}, draft=None, head=None, max_new_tokens=config.max_new_tokens
    )
    vocabulary = grammar.Vocabulary.of(tokenizer, fn.plan.model.config.vocab_size)
    encode = tokenizer.encode_chat if tokenizer.chat_template else tokenizer.encode
    prompts = [encode(text) for text in config.prompts]
    made = {side.name: getattr(grammar, side.language)(side.source, vocabulary) for side in config.grammars}
    timed = TimedDecode(fn, params)

    def run(rule: Any) -> float:
        state, seconds = timed(fn.inputs(prompts, grammars=rule))
        return seconds.decode / int(state.stats.steps.max())  # a step reads one token of every row

    rules = {"none": None, **made}
    for rule in rules.values():
        timed.compile(fn.inputs(prompts, grammars=rule))
    results = alternate([lambda rule=rule: run(rule) for rule in rules.values()], config.repeats)
    figures = summarise(config, dict(zip(rules, results, strict=True)))
    page = ["# What a grammar costs", "", f"{config.model}, {len(prompts)} prompts together. {machine()}", ""]
    page += ["| grammar | ms per token | over none | target |", "| --- | --- | --- | --- |"]
    page += [
        f"| {name} | {1e3 * figures[name]['seconds']:.3f} | {figures[name]['over']:+.1%} | {_target(config, name)} |"
        for name in rules
    ]
    save_page(config, "\n".join(page) + "\n")
    print(json.dumps({"model": config.model, **figures}))


def summarise(config: ConstrainedBenchConfig, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns for each side its median seconds per token and what that is over the one without a grammar.

    Raises InputError where two grammars share a name.
    """
    if len(seconds) != len(config.grammars) + 1:
        raise InputError("grammars must have names of their own, other than 'none'")
    plain = statistics.median(seconds["none"])
    return {
        name: {"seconds": statistics.median(kept), "over": statistics.median(kept) / plain - 1}
        for name, kept in seconds.items()
    }


def _target(config: ConstrainedBenchConfig, name: str) -> str:
    return next((f"at most {side.most:.0%}" for side in config.grammars if side.name == name), "")
