"""Measures CoreInfer: what fewer neurons save, and what they cost. Started by `experiments.bench`.

    mlp, step   the time of the sparse layers' MLPs for one token, and of a whole decoding step, with `timed_beta` of
                the neurons, each over that with all of them; medians of repeats in turn
    cost        for the whole model's greedy continuations, read by the sparse one behind a prompt that was read with
                the whole weights: the mean negative log-likelihood per token, and the share of tokens that the sparse
                model would have written itself

Neurons are chosen as by the method's option `choose`; `static` and `static_magnitude`: those with the most votes, or
the largest sum of |a|, over other questions; `oracle`: for each token anew those with the largest activations, as a
bound, since that takes the whole matrices.

The last line printed is one JSON object; the same figures go to a page that `experiments.results` takes up.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.config import save_page
from experiments.loading import Loader
from experiments.questions import read_questions
from experiments.runtime import machine, setup_runtime
from models.errors import InputError

if TYPE_CHECKING:
    from experiments.neuron_costs import Costs

CHOICES = ("core", "absolute", "magnitude", "static", "static_magnitude", "random", "oracle")


@dataclasses.dataclass(frozen=True)
class CoreInferBenchConfig:
    """One benchmark of CoreInfer."""

    type: Literal["core_infer"] = "core_infer"
    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    questions: Path = Path("configs/prompts/spec_bench.jsonl")  # in Spec-Bench's format; the first turns are prompts
    prompts: int = 8  # questions that are measured, evenly spaced; the others choose the static neurons
    alpha: float = 0.4  # share of a token's positive activations that vote
    betas: tuple[float, ...] = (0.4,)  # shares of neurons kept
    timed_beta: float = 0.4  # of the times
    max_new_tokens: int = 64  # per prompt; a continuation may end earlier
    repeats: int = 15  # timed, after one that is not counted; a third of them for whole steps
    out: Path = Path("results/core_infer_bench/cpu")

    def __post_init__(self) -> None:
        if min(self.prompts, self.max_new_tokens, self.repeats) < 1:
            raise ValueError("prompts, max_new_tokens and repeats must be at least 1")


def costs(
    measure: "Costs", prompts: Sequence[list[int]], texts: Sequence[list[int]], static: Any, betas: Sequence[float]
) -> dict[str, Any]:
    """Returns {"whole": [loss, share], choice: {beta: [loss, share]}}, means over all tokens of all texts."""
    found: dict[tuple[str, float], list[np.ndarray]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        cache, votes = measure.read(prompt)
        found.setdefault(("whole", 1.0), []).append(measure.score(None, cache, prompt, text))
        for choose in CHOICES:
            for beta in betas:
                kernels = measure.kernels(choose, beta, {**votes, **static})
                found.setdefault((choose, beta), []).append(measure.score(kernels, cache, prompt, text))
    means = {key: np.concatenate(rows, axis=1).mean(axis=1).tolist() for key, rows in found.items()}
    table = {choose: {str(beta): means[choose, beta] for beta in betas} for choose in CHOICES}
    return {"whole": means["whole", 1.0], **table}


def page(config: CoreInferBenchConfig, figures: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    table, (loss, _) = figures["cost"], figures["cost"]["whole"]
    cells = {choose: [f"{nll:.2f} ({100 * same:.0f}%)" for nll, same in table[choose].values()] for choose in CHOICES}
    rows = "\n".join(f"| {choose} | {' | '.join(cells[choose])} |" for choose in CHOICES)
    first, last = figures["layers"]
    return (
        f"# What CoreInfer saves and costs\n\n{Path(config.model).name}, float32, layers {first} to {last} sparse, "
        f"alpha {config.alpha}. {machine()}\n\n"
        f"- With {config.timed_beta:.0%} of the neurons the MLPs of these layers take {figures['mlp']:.2f} times their "
        f"time for one token, a whole decoding step {figures['step']:.2f} times its time.\n"
        f"- {figures['texts']} greedy continuations of the whole model, {figures['tokens']} tokens, read by the sparse "
        f"one: negative log-likelihood per token (tokens that it would have written itself). The whole model's is "
        f"{loss:.2f}.\n\n"
        f"| neurons | {' | '.join(f'{beta:.0%}' for beta in config.betas)} |\n|{' --- |' * (len(config.betas) + 1)}\n"
        f"{rows}\n"
    )


def bench_core_infer(config: CoreInferBenchConfig) -> None:
    """Measures, prints and saves the figures."""
    questions = read_questions(config.questions)
    if config.prompts >= len(questions):
        raise InputError(
            f"prompts must leave questions that choose the static neurons: {config.questions} has {len(questions)}, "
            f"prompts is {config.prompts}"
        )
    setup_runtime()
    from decoding import make_decode_fn
    from experiments.neuron_costs import Costs, mlp_ratio, step_ratio

    model, params, tokenizer = Loader("float32").with_tokenizer(config.model)
    encoded = [tokenizer.encode_chat(question.turns[0]) for question in questions]
    measured = [i * len(encoded) // config.prompts for i in range(config.prompts)]
    prompts = [encoded[i] for i in measured]
    greedy = make_decode_fn(model, max_new_tokens=config.max_new_tokens, stop_tokens=tokenizer.stop_ids)
    texts = []
    for prompt in prompts:
        out = greedy(params, [prompt])
        texts.append(np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist())
    measure = Costs(model, params, config.alpha, config.max_new_tokens)
    kernels = measure.kernels("core", config.timed_beta, measure.read(prompts[0])[1])
    options = {"alpha": config.alpha, "beta": config.timed_beta}
    static = measure.votes([prompt for i, prompt in enumerate(encoded) if i not in measured])
    figures = {
        "layers": (measure.layers[0], measure.layers[-1]),
        "mlp": mlp_ratio(model, params, kernels, measure.layers, config.repeats),
        "step": step_ratio(model, params, prompts[0], options, config.max_new_tokens, -(-config.repeats // 3)),
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "cost": costs(measure, prompts, texts, static, config.betas),
    }
    text = page(config, figures)
    save_page(config, text)
    print(f"{text}\n{json.dumps(figures)}")
