"""Checks on a real model that exact methods write plain greedy decoding's tokens, in float32:
`python -m experiments.check_exact --config configs/bench/exact.yaml`.

    alone     each prompt by itself
    together  ragged batches, with a token limit per row: every other row may write as much as it likes, the others less

In both, a few tokens that plain decoding writes in the middle of its texts are stop tokens, besides the model's own.
Where a text differs first, the two highest logits can lie so close together that another order of additions decides:
such a text is counted as a tie, any other one is an error, exit code 1.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.config import load_config, save_page
from experiments.loading import Loader
from experiments.questions import read_questions
from experiments.runtime import forget_programs, machine, run_main, setup_runtime
from models.errors import InputError, unknown_name

TIE = 1e-3  # between the two highest logits


@dataclasses.dataclass(frozen=True)
class CheckedMethod:
    """A method and its own static options."""

    method: str = "prompt_lookup"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


PLAIN = CheckedMethod("greedy")


@dataclasses.dataclass(frozen=True)
class ExactCheckConfig:
    """What is checked."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    draft: str | None = None  # the model that drafts; None: the model itself, its weights rounded to 8 bits
    questions: Path = Path("configs/prompts/spec_bench.jsonl")  # in Spec-Bench's format; the first turns are prompts
    prompts: int = 24  # evenly spaced over those of at most `longest` tokens
    longest: int = 128
    batch: int = 8  # rows of a ragged batch
    max_new_tokens: int = 48  # per row at most
    methods: tuple[CheckedMethod, ...] = (CheckedMethod(),)
    out: Path = Path("results/exact_check/cpu")

    def __post_init__(self) -> None:
        if min(self.prompts, self.batch, self.max_new_tokens, self.longest) < 1:
            raise ValueError("prompts, batch, max_new_tokens and longest must be at least 1")


class Expected(NamedTuple):
    """What plain decoding writes: texts without limits and with them, the limits, and the stop tokens of both."""

    alone: list[list[int]]
    together: list[list[int]]
    limits: list[int]
    stops: tuple[int, ...]


class Found(NamedTuple):
    """How many texts of a method were the same, and how many others differ first at a tie."""

    same: int
    ties: int
    total: int


def decoded(decode_fn: Any, params: Any, prompts: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
    """Returns the texts of one batch."""
    inputs = decode_fn.inputs(prompts, max_new_tokens=limits)
    output = decode_fn.output(decode_fn.advance(params, decode_fn.start(params, *inputs)))
    rows = zip(np.asarray(output.tokens), np.asarray(output.lengths), strict=True)
    return [row[:length].tolist() for row, length in rows]


def cut(text: list[int], stops: Sequence[int], limit: int) -> list[int]:
    """Returns the text up to its first stop token, and to its limit."""
    ends = [place + 1 for place, token in enumerate(text) if token in stops]
    return text[: min([limit, *ends])]


def expectations(texts: Sequence[list[int]], stop_ids: Sequence[int], room: int) -> Expected:
    """Returns what is expected, given the texts of plain decoding with stop tokens `stop_ids`."""
    inner = {text[len(text) // 2] for text in texts[::4]}
    stops = tuple(sorted({*stop_ids, *inner}))
    limits = [room if row % 2 == 0 else 1 + 7 * row % room for row in range(len(texts))]
    alone = [cut(text, stops, room) for text in texts]
    return Expected(alone, [cut(text, stops, most) for text, most in zip(texts, limits, strict=True)], limits, stops)


def gap(model: Any, params: Any, tokens: list[int]) -> float:
    """Returns the distance of the two highest logits behind a text."""
    import jax

    logits = jax.jit(lambda params, text: model.apply({"params": params}, text).logits[0, -1])
    second, first = np.sort(np.asarray(logits(params, np.array([tokens], np.int32))))[-2:]
    return float(first - second)


def compare(
    model: Any,
    params: Any,
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]],
    expected: Sequence[list[int]],
) -> Found:
    """Compares a method's texts with those expected."""
    same = ties = 0
    for prompt, text, wanted in zip(prompts, texts, expected, strict=True):
        if text == wanted:
            same += 1
            continue
        shared = min(len(text), len(wanted))
        place = next((i for i in range(shared) if text[i] != wanted[i]), None)
        ties += place is not None and gap(model, params, [*prompt, *wanted[:place]]) < TIE
    return Found(same, ties, len(prompts))


def page(config: ExactCheckConfig, found: dict[str, tuple[Found, Found]]) -> str:
    """Returns the comparison as Markdown."""
    draft = Path(config.draft).name if config.draft else "the model itself, its weights rounded to 8 bits"
    lines = [
        "# Exact methods against plain greedy decoding",
        "",
        f"{Path(config.model).name}, float32; where a second model drafts it is {draft}. {config.prompts} prompts, "
        f"{config.max_new_tokens} new tokens at most, stop tokens among what is written; together: ragged batches of "
        f"{config.batch} with a limit per row. {machine()}",
        "",
        "| method | alone | together |",
        "| --- | --- | --- |",
    ]
    for name, sides in found.items():
        lines.append(f"| {name} | {' | '.join(map(_said, sides))} |")
    return "\n".join(lines) + "\n"


def _said(found: Found) -> str:
    ties = f", {found.ties} differ at a tie" if found.ties else ""
    return f"same {found.same} of {found.total}{ties}"


def _name(checked: CheckedMethod) -> str:
    options = ", ".join(f"{name} {value}" for name, value in checked.options.items())
    return f"{checked.method} ({options})" if options else checked.method


def made(config: ExactCheckConfig, loader: Loader, checked: CheckedMethod, longest: int, stops: Sequence[int] = ()):
    """Returns (decode function, its params); the cache is of one size for all prompts, so that few things compile.

    Args:
        config: what is checked.
        loader: loads the models.
        checked: the method.
        longest: tokens of the longest prompt.
        stops: stop tokens; none: the model's own.
    """
    from decoding import METHODS

    if checked.method not in METHODS:
        raise unknown_name("method", checked.method, METHODS)
    if METHODS[checked.method].own_head:
        return _with_random_head(config, loader, checked, longest, stops)
    draft = (config.draft or loader.rounded(config.model)) if METHODS[checked.method].drafts else None
    fn, params, _ = loader.decode_fn(
        config.model, checked.method, checked.options, draft=draft, head=None, max_new_tokens=config.max_new_tokens
    )
    return _sized(fn, longest, stops), params


def _with_random_head(
    config: ExactCheckConfig, loader: Loader, checked: CheckedMethod, longest: int, stops: Sequence[int]
) -> tuple[Any, Any]:
    """Returns what `made` does, for a method with a head of the model's own: one that was never trained."""
    import jax

    from decoding import WithDraft, make_decode_fn
    from decoding.speculative.head_kinds import HEADS

    model, params, tokenizer = loader.model(config.model)
    fn = make_decode_fn(
        model,
        checked.method,
        max_new_tokens=config.max_new_tokens,
        stop_tokens=tokenizer.stop_ids,
        **checked.options,
    )
    head = HEADS[checked.method].init(fn.plan.options.head, model, params, jax.random.key(0))
    head = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), head)
    return _sized(fn, longest, stops), WithDraft(params, head)


def _sized(fn: Any, longest: int, stops: Sequence[int]) -> Any:
    """Returns the decode function with a cache for the longest prompt and these stop tokens."""
    from decoding import DecodeFn
    from decoding.prefill import bucket_length

    slots = fn.plan.num_slots(bucket_length(longest))
    plan = dataclasses.replace(fn.plan, stop_tokens=tuple(stops) or fn.plan.stop_tokens, cache_slots=slots)
    return DecodeFn(plan, fn.settings)


def check(config: ExactCheckConfig, loader: Loader, prompts: Sequence[list[int]]) -> dict[str, tuple[Found, Found]]:
    """Returns {method: what was found with prompts alone, and together}."""
    model, params, _ = loader.model(config.model)
    room, longest = config.max_new_tokens, max(map(len, prompts))

    def alone(fn: Any, params: Any) -> list[list[int]]:
        return [decoded(fn, params, [prompt], [room])[0] for prompt in prompts]

    def together(fn: Any, params: Any, limits: Sequence[int]) -> list[list[int]]:
        batches = [slice(first, first + config.batch) for first in range(0, len(prompts), config.batch)]
        return [text for rows in batches for text in decoded(fn, params, prompts[rows], limits[rows])]

    greedy, _ = made(config, loader, PLAIN, longest)
    expected = expectations(alone(greedy, params), greedy.plan.stop_tokens, room)
    found = {}
    for checked in (PLAIN, *config.methods):
        forget_programs()
        call = made(config, loader, checked, longest, expected.stops)
        found[_name(checked)] = both = (
            compare(model, params, prompts, alone(*call), expected.alone),
            compare(model, params, prompts, together(*call, expected.limits), expected.together),
        )
        print(f"{_name(checked)}: alone {_said(both[0])}; together {_said(both[1])}", flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    """Checks, prints and saves what was found."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m experiments.check_exact"
    config = load_config(ExactCheckConfig, argv, prog=prog, description=(__doc__ or "").split("\n")[0])
    questions = read_questions(config.questions)
    setup_runtime()
    loader = Loader("float32")
    tokenizer = loader.with_tokenizer(config.model)[2]
    encoded = [tokenizer.encode_chat(question.turns[0]) for question in questions]
    short = [prompt for prompt in encoded if len(prompt) <= config.longest]
    if len(short) < config.prompts:
        raise InputError(
            f"{config.questions} has {len(short)} prompts of at most {config.longest} tokens, prompts asks for "
            f"{config.prompts}: raise longest or lower prompts"
        )
    found = check(config, loader, [short[i * len(short) // config.prompts] for i in range(config.prompts)])
    text = page(config, found)
    save_page(config, text)
    print(f"\n{text}")
    wrong = [name for name, sides in found.items() if any(side.same + side.ties < side.total for side in sides)]
    if wrong:
        sys.exit(f"not exact: {', '.join(wrong)}")


if __name__ == "__main__":
    run_main(main)
