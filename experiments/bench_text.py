"""Perplexity of a long text that is read token by token: `python -m experiments.bench`, `type: long_text`.

Each row is a way to attend. The first `prompt` tokens are read as a prompt; from there on every token is read in a step
of its own, as in decoding, with what the row's attention has left in the cache before. Perplexity is that of the tokens
between one length and the next; the time of a step is the mean over all of them, with a cache for the whole text.

The last line printed is one JSON object; the same figures go to a page that `experiments.results` takes up.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.config import save_page
from experiments.loading import Loader
from experiments.runtime import machine, setup_runtime
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextRow:
    """A way to attend: a method, of which the attention alone is used, and how it is set."""

    name: str = "dense"
    method: str = "greedy"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LongTextConfig:
    """One benchmark of attention on a long text."""

    type: Literal["long_text"] = "long_text"
    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    dtype: Literal["float32", "bfloat16"] | None = None  # None: as stored (GGUF: float32)
    texts: tuple[Path, ...] = (Path("README.md"),)  # files, read as one text in this order
    prompt: int = 512  # first tokens, which are read as a prompt
    lengths: tuple[int, ...] = (2048, 4096, 8192)  # tokens; the text is cut at the last one
    rows: tuple[TextRow, ...] = (TextRow(),)
    out: Path = Path("results/long_text_bench/cpu")

    def __post_init__(self) -> None:
        ends = (self.prompt, *self.lengths)
        if self.prompt < 1 or not self.lengths or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError("prompt must be at least 1, and lengths must grow from there")
        if not self.rows or not self.texts or len({row.name for row in self.rows}) != len(self.rows):
            raise ValueError("there must be a text and a row, and rows must have names of their own")


def policy_of(model: Any, row: TextRow, options: dict[str, Any]) -> Any:
    """Returns the attention policy of a row's method with these options; raises InputError where they are about more
    than attention.
    """
    from decoding import make_decode_fn

    for name in ("drafted", "correct_every"):
        if options.get(name):
            raise InputError(f"row {row.name!r} of a long text is about attention alone: leave out {name}")
    return make_decode_fn(model, row.method, **options).plan.steps().policy


def read_text(config: LongTextConfig, tokenizer: Any) -> np.ndarray:
    """Returns i32[T], the text's first tokens; raises InputError where it is too short or cannot be read."""
    try:
        text = "\n".join(path.read_text(encoding="utf-8") for path in config.texts)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read a text: {error}") from error
    tokens = tokenizer.encode(text)
    if len(tokens) < config.lengths[-1]:
        raise InputError(
            f"the texts have {len(tokens)} tokens, fewer than the last of lengths ({config.lengths[-1]}): name more "
            "files in texts, or lower lengths"
        )
    return np.asarray(tokens[: config.lengths[-1]], np.int32)


def token_losses(model: Any, params: Any, policy: Any, tokens: np.ndarray, prompt: int) -> tuple[np.ndarray, float]:
    """Returns (f32[T - prompt], seconds of a step): -log p of each token behind the prompt, given all before it.

    Args:
        model: the network.
        params: its parameters.
        policy: how they attend.
        tokens: i32[T], the text.
        prompt: how many of them are read as a prompt.
    """
    import jax
    import jax.numpy as jnp

    from decoding.autoregressive import target_step
    from decoding.prefill import pad_prompts, prefill
    from decoding.state import init_state

    padded = pad_prompts([tokens[:prompt]], model.config.vocab_size)
    num_slots = max(len(tokens), padded.tokens.shape[1])
    read = functools.partial(prefill, model, num_slots=num_slots, attend=policy.read)
    cache = jax.jit(read)(params, prompts=padded)

    def step(params, carry, pair):
        state, memory = carry
        token, wanted = pair
        logits, memory, state = target_step(model, params, state.replace(last=token[None]), policy, memory)
        return (state, memory), -jax.nn.log_softmax(logits[0])[wanted]

    @jax.jit
    def run(params, cache, tokens):
        state = init_state(cache, tokens[:1], jnp.ones((1,), jnp.int32), 1, 1, None)
        first = state.replace(cache=policy.keep(cache)), policy.init(cache)
        return jax.lax.scan(functools.partial(step, params), first, (tokens[:-1], tokens[1:]))[1]

    forced = jnp.asarray(tokens[prompt - 1 :])
    compiled = run.lower(params, cache, forced).compile()
    begin = time.perf_counter()
    losses = np.asarray(compiled(params, cache, forced))
    return losses, (time.perf_counter() - begin) / len(losses)


def page(config: LongTextConfig, figures: dict[str, dict[str, Any]]) -> str:
    """Returns the figures as Markdown."""
    ends = (config.prompt, *config.lengths)
    columns = [f"{first} to {last}" for first, last in zip(ends, ends[1:], strict=False)]
    lines = [
        "# Perplexity of a long text, read token by token",
        "",
        f"{Path(config.model).name}; {', '.join(path.as_posix() for path in config.texts)}. {machine()}",
        "",
        f"| attention | {' | '.join(f'tokens {column}' for column in columns)} | ms per token |",
        f"|{' --- |' * (len(columns) + 2)}",
    ]
    for name, row in figures.items():
        values = " | ".join(f"{value:.3f}" for value in row["perplexity"])
        lines.append(f"| {name} | {values} | {1e3 * row['step_seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def bench_text(config: LongTextConfig) -> None:
    """Measures, prints and saves the figures."""
    setup_runtime()
    loader = Loader(config.dtype)
    model, params, tokenizer = loader.model(config.model)
    if tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer.json: put the model's tokenizer.json into the folder")
    if config.lengths[-1] > model.config.max_length:
        raise InputError(
            f"lengths end at {config.lengths[-1]}, the model's context is {model.config.max_length} tokens"
        )
    tokens = read_text(config, tokenizer)
    policies = {row.name: policy_of(model, row, loader.with_gates(config.model, row.options)) for row in config.rows}
    figures = {}
    for name, policy in policies.items():
        losses, seconds = token_losses(model, params, policy, tokens, config.prompt)
        parts = np.split(losses, np.asarray(config.lengths[:-1]) - config.prompt)
        perplexity = [float(np.exp(part.mean(dtype=np.float64))) for part in parts]
        figures[name] = {"perplexity": perplexity, "step_seconds": seconds}
        print(f"{name:<24} {' '.join(f'{value:9.3f}' for value in perplexity)}  {1e3 * seconds:6.1f} ms", flush=True)
    text = page(config, figures)
    save_page(config, text)
    print(f"\n{text}\n{json.dumps(figures)}")
