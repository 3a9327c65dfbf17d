"""What `experiments.decode` is told: its config, the prompts and contexts that this names, and what does not go
together.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.text_records import text_records
from models.errors import InputError, unknown_name

CONTEXT = "<context>"  # stands in a prompt where its context is to stand; in front where it does not


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Settings of methods that sample; None keeps the method's default."""

    temperature: float | None = None  # >= 0; 0 is greedy
    top_k: int | None = None  # keep the k most likely tokens; 0 keeps all
    top_p: float | None = None  # (0, 1]; keep the smallest set with this mass
    min_p: float | None = None  # [0, 1]; keep tokens with this share of the top probability
    repetition_penalty: float | None = None  # > 0; 1 changes nothing


@dataclasses.dataclass(frozen=True)
class GrammarSettings:
    """A grammar for all texts, in one of three languages; for methods that take one."""

    regex: str | None = None  # a regular expression that the whole text matches
    lark: str | None = None  # a context-free grammar in Lark's syntax, whose first rule is `start`
    json_schema: str | None = None  # a JSON Schema, as JSON

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.regex, self.lark, self.json_schema)) > 1:
            raise ValueError("give one grammar at most: regex, lark or json_schema")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """One decoding run."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    dtype: Literal["float32", "bfloat16"] | None = None  # None: as stored (GGUF: float32)
    prompt: tuple[str, ...] = ()  # one or several prompts
    prompts: Path | None = None  # a JSON Lines file whose objects have a "prompt"; they come behind those of the flag
    chat: bool = True  # put prompts through the model's chat template, where it has one
    adapter: Path | None = None  # an adapter that experiments.train saved for this model; merged into it
    dolphin: Path | None = None  # a trained pair (experiments.train with `dolphin`): `model` reads memory of contexts
    compressor: str = "smollm2-135m-instruct"  # what makes that memory, by name or path
    contexts: tuple[str, ...] = ()  # with dolphin: one for all prompts, or one for each; see CONTEXT for its place
    method: str = "greedy"  # a decoding method
    draft: str | None = None  # the model that drafts, by name or path, for methods that draft with a second one
    head: Path | None = None  # a trained head, for methods that use one (experiments.train_{acceptance,draft}_head)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the method's own options and settings
    sampling: SamplingSettings = SamplingSettings()
    grammar: GrammarSettings = GrammarSettings()
    seed: int = 0  # prompt i samples with seed + i
    max_new_tokens: int = 128  # per prompt
    batch_size: int = 1  # prompts decoded together
    stream: bool = False  # print text as it is made (needs batch_size 1 and text output)
    output: Literal["text", "json"] = "text"
    save: Path | None = None  # also write the JSON lines here

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("batch_size and max_new_tokens must be at least 1")
        if self.stream and (self.batch_size > 1 or self.output == "json"):
            raise ValueError("stream needs batch_size 1 and output text")
        if self.save is not None and (self.save.is_dir() or not self.save.name):
            raise ValueError(f"save must name a file, and {self.save} is a folder: add a name to it")
        if (self.dolphin is None) != (not self.contexts):
            raise ValueError("dolphin and contexts go together: name the pair's file, and at least one context")
        if self.dolphin is not None and self.adapter is not None:
            raise ValueError("a pair brings its own adapter: leave out adapter")


def read_prompts(config: DecodeConfig) -> list[str]:
    """Returns the prompts of the flags and then of the file.

    Raises:
        InputError: no prompt at all, an empty one, or a bad line in the file (named by number).
    """
    prompts = list(config.prompt)
    if config.prompts is not None:
        prompts += [line["prompt"] for _, line in text_records(config.prompts, "prompts file", "prompt")]
    if not prompts:
        raise InputError("no prompts: pass --prompt TEXT (repeatable) or --prompts FILE.jsonl")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompt {index + 1} is empty; give it some text")
    return prompts


def with_contexts(config: DecodeConfig, prompts: Sequence[str]) -> tuple[str, ...]:
    """Returns the context of each prompt, none without any; raises InputError where they are not as many, or one."""
    given = config.contexts * (len(prompts) if len(config.contexts) == 1 else 1)
    if given and len(given) != len(prompts):
        raise InputError(f"contexts must be one, or one for each of {len(prompts)} prompts; got {len(given)}")
    return given


def check_method(config: DecodeConfig) -> None:
    """Raises InputError where the method is unknown, or does not go with what else is set."""
    from decoding import METHODS

    if config.method not in METHODS:
        raise unknown_name("method", config.method, METHODS)
    method = METHODS[config.method]
    if method.drafts and config.draft is None:
        raise InputError(f"method {config.method!r} drafts with a second model: name it with --draft")
    if config.draft is not None and not method.drafts:
        drafting = ", ".join(name for name, row in METHODS.items() if row.drafts)
        raise InputError(f"method {config.method!r} drafts with no second model: leave out --draft, or use {drafting}")
    if config.head is not None and not method.head:
        heads = ", ".join(name for name, row in METHODS.items() if row.head)
        raise InputError(f"method {config.method!r} has no use for a head: leave out --head, or use {heads}")
    if method.own_head and config.head is None:
        raise InputError(
            f"method {config.method!r} drafts with a trained head: name its file with --head; python -m "
            f"experiments.train_draft_head --config configs/train/{config.method}.yaml trains one"
        )
    if config.batch_size > 1 and method.shared:
        raise InputError(
            f"with method {config.method!r} the rows of a batch share a choice, and a text would depend on the prompts "
            f"beside it: set --batch_size 1, got {config.batch_size}"
        )
    grammars = [name for name, source in dataclasses.asdict(config.grammar).items() if source is not None]
    if grammars and not method.grammars:
        taking = ", ".join(name for name, row in METHODS.items() if row.grammars)
        raise InputError(f"method {config.method!r} takes no grammar.{grammars[0]}: leave it out, or use {taking}")
    given = [name for name, value in dataclasses.asdict(config.sampling).items() if value is not None]
    if given and method.temperature is None:
        raise InputError(f"method {config.method!r} takes no {given[0]}: leave it out, or use --method sample")
