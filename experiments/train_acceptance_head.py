"""Trains the head that stops drafts: `python -m experiments.train_acceptance_head --config FILE.yaml`.

The target answers questions, the draft's tokens get labels, a small head learns to predict them (SpecDec++, 2405.19715;
`finetune.acceptance_head`). Prints how well it predicts before and after, on prompts that decided when to stop and on
prompts that decided nothing, and saves the head as safetensors for `experiments.decode --head`. The same models, seed
and machine give the same head.

Of every five questions of a task the first is for testing, the second for stopping, three are for learning: tables that
take one or two of ten questions of a task measure on none that the head has seen.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.config import dump_config, load_config
from experiments.questions import Question, read_questions
from experiments.runtime import run_main, setup_runtime
from models.errors import InputError

_PROG = "python -m experiments.train_acceptance_head"


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """One training run."""

    model: str = "qwen2.5-coder-1.5b-instruct"  # the target: a registry name, a .gguf file, or a model folder
    draft: str = "qwen2.5-coder-0.5b-instruct"  # the model that drafts, and gets the head
    dtype: Literal["float32", "bfloat16"] | None = None  # None: as stored (GGUF: float32)
    questions: Path = Path("configs/prompts/spec_bench.jsonl")  # in Spec-Bench's format; first turns are used
    per_task: int | None = None  # questions of each task for each purpose, at most; None: all
    max_new_tokens: int = 64  # that the target samples per question
    batch_size: int = 4  # questions read together
    mix: float = 0.15  # the chance that the draft reads the target's token in place of its own
    depth: int = 3  # blocks of the head
    weight: float = 6.0  # of a rejection in the loss
    epochs: int = 20  # at most
    patience: int = 3  # epochs without a better head after which training ends
    places: int = 128  # tokens per update
    lr: float = 1e-3  # highest learning rate
    seed: int = 0
    out: Path = Path("results/specdec_pp/head.safetensors")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1 or (self.per_task is not None and self.per_task < 1):
            raise ValueError("max_new_tokens, batch_size and per_task must be at least 1")


def split(questions: Sequence[Question], per_task: int | None) -> dict[str, list[Question]]:
    """Returns {train, dev, test: questions}, by their places among each task's; none is in two of them."""
    purposes = {"test": (0,), "dev": (1,), "train": (2, 3, 4)}
    found: dict[str, list[Question]] = {"train": [], "dev": [], "test": []}
    for task in dict.fromkeys(question.task for question in questions):
        own = [question for question in questions if question.task == task]
        for purpose, places in purposes.items():
            found[purpose] += [question for place, question in enumerate(own) if place % 5 in places][:per_task]
    missing = [purpose for purpose, chosen in found.items() if not chosen]
    if missing:
        raise InputError(f"too few questions: none left for {', '.join(missing)}; a task needs three or more")
    return found


def collect_all(config: HeadConfig) -> dict[str, Any]:
    """Returns {train, dev, test: Features}."""
    from finetune.acceptance_head import collect
    from models import load_model

    chosen = split(read_questions(config.questions), config.per_task)
    target, target_params, tokenizer = load_model(config.model, config.dtype)
    draft, draft_params, _ = load_model(config.draft, config.dtype)
    if tokenizer is None or tokenizer.chat_template is None:
        raise InputError(f"{config.model} has no chat template: choose an instruction-tuned model")
    if draft.config.vocab_size != target.config.vocab_size:
        raise InputError(f"{config.draft} and {config.model} have different vocabularies: they must share a tokenizer")
    found = {}
    for purpose, questions in chosen.items():

        def report(done: int, purpose: str = purpose, total: int = len(questions)) -> None:
            print(f"{purpose}: {done}/{total} texts", flush=True)

        found[purpose] = collect(
            target,
            target_params,
            draft,
            draft_params,
            [tokenizer.encode_chat(question.turns[0]) for question in questions],
            max_new_tokens=config.max_new_tokens,
            stop_tokens=tokenizer.stop_ids,
            mix=config.mix,
            seed=config.seed,
            batch_size=config.batch_size,
            report=report,
        )
        accept = found[purpose].accept
        print(f"{purpose}: {len(accept)} drafted tokens, {accept.mean():.3f} of them accepted", flush=True)
    return found


def run(config: HeadConfig) -> dict[str, Any]:
    """Trains and saves a head; returns its figures on dev and test prompts, before and after."""
    from finetune.acceptance_head import Scores, TrainConfig, scores, train
    from models.acceptance_head import save_head

    settings = TrainConfig(
        config.depth, config.weight, config.epochs, config.patience, config.places, config.lr, seed=config.seed
    )
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {config.out.parent}: {error}") from error
    found = collect_all(config)

    def report(epoch: int, loss: float, figures: Scores) -> None:
        trained = f"epoch {epoch:>3}  loss {loss:.4f}" if epoch else "before training       "
        print(f"{trained}  dev KL {figures.kl:.4f}  ECE {figures.ece:.4f}", flush=True)

    params, history = train(found["train"], found["dev"], settings, report)
    dev, test = scores(settings, params, found["dev"]), scores(settings, params, found["test"])
    figures = {
        "dev_kl_before": history[0].kl,
        "dev_kl": dev.kl,
        "dev_ece": dev.ece,
        "test_kl": test.kl,
        "test_ece": test.ece,
        "test_kl_constant": constant_kl(found["train"].accept, found["test"].accept),
        "epochs": len(history) - 1,
    }
    facts = {"target": Path(config.model).name, "config": dump_config(config), "figures": json.dumps(figures)}
    save_head(config.out, params, draft=config.draft, depth=config.depth, facts=facts)
    return figures


def constant_kl(seen: Any, accept: Any) -> float:
    """Returns the divergence on labels f32[N] of the one word that fits the labels seen in training best."""
    import numpy as np

    from finetune.acceptance_head import binary_kl

    word = np.clip(np.float32(seen.mean()), 1e-6, 1 - 1e-6)
    logits = np.broadcast_to(np.log(np.array([1 - word, word], np.float32)), (len(accept), 2))
    return float(binary_kl(logits, accept))


def ensure_head(path: Path, train: Path | None, model: str, draft: str, dtype: str | None) -> None:
    """Trains the head for a pair of models where its file does not exist yet.

    Args:
        path: the head's file.
        train: a config of this main, for everything but the models and the file; None: none can be trained.
        model: the target.
        draft: the model that drafts.
        dtype: of both.
    """
    if path.exists():
        return
    if train is None:
        raise InputError(f"no such head: {path}; name a config of {_PROG} that trains it")
    config = load_config(HeadConfig, ["--config", str(train)], prog=_PROG, description="")
    print(f"training the head {path} first ({train})", flush=True)
    run(dataclasses.replace(config, model=model, draft=draft, dtype=dtype, out=path))


def head_stamp(path: Path | None) -> str:
    """Returns the SHA-256 of a head's file, "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else ""


def main() -> None:
    """Loads the config, trains, saves, prints the figures."""
    config = load_config(HeadConfig, prog=_PROG, description=(__doc__ or "").split("\n")[0])
    setup_runtime()
    figures = run(config)
    print(f"\ndev KL {figures['dev_kl_before']:.4f} before training, {figures['dev_kl']:.4f} after")
    print(
        f"test KL {figures['test_kl']:.4f} (one word for all tokens: {figures['test_kl_constant']:.4f}), "
        f"ECE {figures['test_ece']:.4f}"
    )
    print(f"saved in {config.out}")


if __name__ == "__main__":
    run_main(main)
