"""Times speculation on this machine: `python -m experiments.bench_speculation --config configs/bench/speculation.yaml`.

    verify_cost   the time of a target pass over n rows, in passes over one row
    bandwidth     the bytes of the weights over that time, in GB per second: a pass over few rows does little else than
                  read them
    overhead      what a step of Token Recycling over 16 rows takes besides the target's pass: the draft, the
                  verification, the cache's commit, the table's update; as a share of the step
    batched       new tokens per second of 8 prompts of different lengths in one batch, over those of the same prompts
                  one after another
    log_prob      the mean log-probability, under the model itself, of sampled tokens: plain, by Token Recycling (node
                  sampling), and by RSD-C (recursive rejection; the model drafts, its weights rounded to 8 bits), and
                  the difference in standard errors (each samples with its own seeds)

The last line printed is one JSON object; the same figures go to a page that `experiments.results` takes up.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import load_config, save_page
from experiments.loading import Loader
from experiments.questions import read_questions
from experiments.runtime import machine, run_main, setup_runtime
from experiments.timed import TimedDecode

ROWS = (1, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class SpeculationBenchConfig:
    """One benchmark of speculation."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    questions: Path = Path("configs/prompts/spec_bench.jsonl")  # in Spec-Bench's format; the first turns are prompts
    batch: int = 8  # prompts, of different lengths
    width: int = 8  # rows of Token Recycling's tree in the batched comparison
    max_new_tokens: int = 64  # per prompt
    repeats: int = 3
    out: Path = Path("results/speculation_bench/cpu")

    def __post_init__(self) -> None:
        if min(self.batch, self.max_new_tokens, self.repeats) < 1 or self.width < 2:
            raise ValueError("batch, max_new_tokens and repeats must be at least 1, width at least 2")


def verify_cost(model: Any, params: Any, context: int) -> tuple[dict[int, float], dict[int, float]]:
    """Returns {rows: time of a pass over them, in passes over one} and {rows: GB of weights per second of it}."""
    import jax

    from decoding.speculative.sizing import measure

    curve = measure(model, params, ROWS, context=context, repeats=15)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9
    seconds = dict(zip(curve.sizes, curve.seconds, strict=True))
    cost = {size: taken / curve.seconds[0] for size, taken in seconds.items()}
    return cost, {size: weights / taken for size, taken in seconds.items()}


def overhead(model: Any, params: Any, prompt: list[int], new_tokens: int, repeats: int) -> float:
    """Returns the share of a 16-row step that is not the target's pass; the fastest of passes and steps in turn."""
    from decoding import make_decode_fn
    from decoding.speculative.sizing import measure

    timed = TimedDecode(make_decode_fn(model, "token_recycling", max_new_tokens=new_tokens, width=16), params)
    inputs = timed.decode_fn.inputs([prompt])
    timed.warm_up(inputs)
    passes, steps = [], []
    for _ in range(repeats):
        state, seconds = timed(inputs)
        steps.append(seconds.decode / int(state.stats.steps[0]))
        context = len(prompt) + new_tokens // 2
        passes.append(measure(model, params, (1, 16), context=context, repeats=5).seconds[1])
    return 1 - min(passes) / min(steps)


def batched(model: Any, params: Any, prompts: Sequence[list[int]], config: SpeculationBenchConfig) -> float:
    """Returns the speed of one batch over that of its prompts one after another, in new tokens per second."""
    from decoding import make_decode_fn

    decode_fn = make_decode_fn(
        model,
        "token_recycling",
        max_new_tokens=config.max_new_tokens,
        width=config.width,
        cache_slots=_slots(config, prompts),
    )
    timed = TimedDecode(decode_fn, params)
    together = decode_fn.inputs(prompts)
    for inputs in (together, *(decode_fn.inputs([prompt]) for prompt in prompts)):
        timed.warm_up(inputs)
    ratios = []
    for _ in range(config.repeats):
        _, seconds = timed(together)
        singles, warm = 0.0, None  # one after another, each starts with what those before it have taught the table
        for prompt in prompts:
            state, single = timed(decode_fn.inputs([prompt], warm=warm))
            warm = decode_fn.output(state).warm
            singles += single.prefill + single.decode
        ratios.append(singles / (seconds.prefill + seconds.decode))
    return statistics.median(ratios)  # both sides give every prompt the same number of new tokens


def _slots(config: SpeculationBenchConfig, prompts: Sequence[list[int]]) -> int:
    return max(map(len, prompts)) + config.max_new_tokens + config.width


def log_prob(
    model: Any, params: Any, draft_params: Any, prompts: Sequence[list[int]], new_tokens: int
) -> dict[str, dict[str, float]]:
    """Returns {method: mean log-probability per sampled token, and its distance from `sample`'s in standard errors}.

    A row is one observation: tokens of a row depend on each other.
    """
    from decoding import WithDraft, make_decode_fn

    methods = {
        "sample": (params, {}),
        "token_recycling": (params, {"width": 8}),
        "rsd_c": (WithDraft(params, draft_params), {"draft": model, "children": (2, 1)}),
    }
    found: dict[str, dict[str, float]] = {}
    for seed, (method, (given, options)) in enumerate(methods.items(), 1):
        fn = make_decode_fn(model, method, max_new_tokens=new_tokens, **options)
        rows = _mean_log_probs(model, params, prompts, np.asarray(fn(given, prompts, seed, temperature=1.0).tokens))
        mean, variance = float(rows.mean()), float(np.var(rows, ddof=1) / len(rows))
        plain = found.get("sample", {"mean": mean, "variance": variance})
        distance = (mean - plain["mean"]) / (variance + plain["variance"]) ** 0.5
        found[method] = {"mean": mean, "variance": variance, "standard_errors": distance}
    return found


def _mean_log_probs(model: Any, params: Any, prompts: Sequence[list[int]], tokens: np.ndarray) -> np.ndarray:
    """Returns f64[B]: the mean log-probability of each row's tokens i32[B, N] behind its prompt."""
    import jax
    import jax.numpy as jnp

    from models.acceptance_head import read_hidden

    @jax.jit
    def scored(params, text, places):
        logits = model.apply({"params": params}, text, None, places, method=read_hidden)[0]
        wanted = jnp.take_along_axis(text, places + 1, axis=1)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0].mean(axis=1)

    width = max(map(len, prompts)) + tokens.shape[1]
    found = []
    for prompt, row in zip(prompts, tokens, strict=True):
        text = np.zeros((1, width), np.int32)
        text[0, : len(prompt) + len(row)] = [*prompt, *row]
        places = np.arange(len(prompt) - 1, len(prompt) + len(row) - 1)[None, :]
        found.append(float(scored(params, text, places)[0]))
    return np.asarray(found)


def page(config: SpeculationBenchConfig, figures: dict[str, Any]) -> str:
    """Returns the figures as Markdown."""
    cost = " | ".join(f"{figures['verify_cost'][rows]:.2f}" for rows in ROWS)
    read = " | ".join(f"{figures['bandwidth'][rows]:.1f}" for rows in ROWS)
    log = figures["log_prob"]
    speculative = ", ".join(
        f"{log[name]['mean']:.3f} by {title} ({log[name]['standard_errors']:+.1f} standard errors)"
        for name, title in (("token_recycling", "Token Recycling"), ("rsd_c", "RSD-C"))
    )
    return (
        f"# What speculation costs\n\n{Path(config.model).name}, float32. {machine()}\n\n"
        f"| rows of a target pass | {' | '.join(map(str, ROWS))} |\n|{' --- |' * (len(ROWS) + 1)}\n"
        f"| time, in passes over one row | {cost} |\n| weights read, GB per second | {read} |\n\n"
        f"- A step over 16 rows spends {100 * figures['overhead']:.1f}% on everything but the target's pass.\n"
        f"- {config.batch} prompts of different lengths in one batch: {figures['batched']:.2f} times the tokens per "
        f"second of the same prompts one after another (Token Recycling, {config.width} rows).\n"
        f"- Sampled tokens' mean log-probability: plain {log['sample']['mean']:.3f}; {speculative}.\n"
    )


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and saves the figures."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m experiments.bench_speculation"
    config = load_config(SpeculationBenchConfig, argv, prog=prog, description=(__doc__ or "").split("\n")[0])
    questions = read_questions(config.questions)
    setup_runtime()
    loader = Loader("float32")
    model, params, tokenizer = loader.with_tokenizer(config.model)
    drafts = loader.model(loader.rounded(config.model))[1]
    spaced = [questions[i * len(questions) // config.batch] for i in range(config.batch)]
    prompts = [tokenizer.encode_chat(question.turns[0]) for question in spaced]
    middle = sorted(prompts, key=len)[len(prompts) // 2]
    shortest = sorted((tokenizer.encode_chat(question.turns[0]) for question in questions), key=len)[: config.batch]
    cost, bandwidth = verify_cost(model, params, 256)
    figures = {
        "verify_cost": cost,
        "bandwidth": bandwidth,
        "overhead": overhead(model, params, middle, config.max_new_tokens, config.repeats),
        "batched": batched(model, params, prompts, config),
        "log_prob": log_prob(model, params, drafts, shortest * 4, config.max_new_tokens),
    }
    text = page(config, figures)
    save_page(config, text)
    print(f"{text}\n{json.dumps(figures)}")


if __name__ == "__main__":
    run_main(main)
