"""Measures how isotropic models' hidden states are, layer by layer, on texts of several languages (2210.14140, section
3; `experiments.isotropy`). Started by `experiments.bench`.

The last line printed is one JSON object with every layer; a page of a few of them goes to `experiments.results`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from experiments.config import save_page
from experiments.runtime import forget_programs, machine, setup_runtime
from experiments.text_records import text_records
from models.errors import InputError

_PAPER = (
    "The paper, on English texts: GPT-2 small 0.10, medium 0.25, large 0.70; OPT 0.66 to 0.75 but for one; models of "
    "GPT-2's kind in other languages 0.53 to 0.83."
)


@dataclasses.dataclass(frozen=True)
class IsotropyBenchConfig:
    """What is read."""

    type: Literal["isotropy"] = "isotropy"
    models: tuple[str, ...] = ("smollm2-135m-instruct",)  # registry names, .gguf files, or model folders
    texts: Path = Path("configs/prompts/languages.jsonl")  # JSON lines with a "language" and a "text"
    out: Path = Path("results/isotropy_bench/cpu")

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models is empty: name at least one")


def read_languages(path: Path) -> dict[str, list[str]]:
    """Returns {language: texts}; raises InputError where there is no such file, or a bad line (named by number)."""
    found: dict[str, list[str]] = {}
    for number, record in text_records(path, "file of texts", "language", "text"):
        if not record["text"].strip():
            raise InputError(f"{path}:{number}: the text is empty; give it some words")
        found.setdefault(record["language"], []).append(record["text"])
    if not found:
        raise InputError(f"{path} has no texts")
    return found


def measured(config: IsotropyBenchConfig) -> dict[str, dict[str, Any]]:
    """Returns {model: {language: {layer: {"raw": .., "centred": ..}}}}."""
    from experiments.isotropy import layer_isotropy
    from experiments.loading import Loader

    texts, loader = read_languages(config.texts), Loader("float32")
    found: dict[str, dict[str, Any]] = {}
    for name in config.models:
        forget_programs()
        model, params, tokenizer = loader.with_tokenizer(name)
        found[Path(name).name] = {
            language: layer_isotropy(model, params, [tokenizer.encode(text) for text in own])
            for language, own in texts.items()
        }
    return found


def page(config: IsotropyBenchConfig, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the figures of a first, a middle and the last layer, and of what the head reads, as Markdown."""
    lines = [
        f"# How isotropic hidden states are\n\nTexts of {config.texts.name}, models in float32. {machine()}\n",
        "Isotropy is 1 minus the mean cosine of a text's tokens; in brackets with the mean of the language's texts "
        f"removed. {_PAPER}\n",
        "| model | language | behind the first layer | behind the middle one | behind the last | what the head reads |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, languages in found.items():
        for language, layers in languages.items():
            last = len(layers) - 2
            shown = [layers[key] for key in ("0", str(last // 2), str(last), "normed")]
            cells = [f"{own['raw']:.2f} ({own['centred']:.2f})" for own in shown]
            lines.append(f"| {name} | {language} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bench_isotropy(config: IsotropyBenchConfig) -> None:
    """Measures, prints and saves."""
    setup_runtime()
    found = measured(config)
    text = page(config, found)
    save_page(config, text)
    print(text)
    print(json.dumps(found))
