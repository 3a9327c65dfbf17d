"""Lets a model write texts and stores its hidden states over them, to train it, or heads that draft for it:
`python -m experiments.generate --config configs/generate/smollm2.yaml`.

Writes texts.jsonl, and hidden/ with the residual streams that were asked for. Run it again after an interruption: it
goes on where it stopped, with the same texts. Every other text of a split is greedy, the others are sampled.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments.chat_prompts import chat_prompts
from experiments.config import load_config
from experiments.kept import locked
from experiments.runtime import run_main, setup_runtime
from models.errors import InputError

_PROG = "python -m experiments.generate"


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What is written."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    dtype: Literal["float32", "bfloat16"] | None = None  # None: as stored (GGUF: float32)
    train: int = 800  # texts to train on
    calibration: int = 64  # texts that decide on trees
    test: int = 64  # texts that accept lengths are measured on
    max_new_tokens: int = 160  # of a text
    temperature: float = 0.8  # of the texts that are sampled
    batch_size: int = 48  # texts written together
    layers: tuple[int, ...] = ()  # streams to store, by the layer they enter; none: the one behind the last layer
    seed: int = 0
    out: Path = Path("results/texts/smollm2-135m-instruct")

    def __post_init__(self) -> None:
        if min(self.train, self.calibration, self.test) < 1 or self.batch_size < 1:
            raise ValueError("train, calibration, test and batch_size must be at least 1")
        if self.max_new_tokens < 8:
            raise ValueError("max_new_tokens must be at least 8")
        if not self.temperature > 0:
            raise ValueError("temperature must be above 0")

    @property
    def counts(self) -> dict[str, int]:
        """Texts of each split."""
        return {"train": self.train, "calibration": self.calibration, "test": self.test}


def write_texts(config: GenerateConfig, loader: Any, base: Any) -> Path:
    """Writes what is missing of texts.jsonl; returns its path."""
    from finetune import self_texts

    settings = {
        **config.counts,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
    }
    decode_fn, params, tokenizer = loader.decode_fn(
        config.model, "sample", {}, draft=None, head=None, max_new_tokens=config.max_new_tokens
    )
    if tokenizer.chat_template is None:
        raise InputError(f"{config.model} has no chat template: choose an instruction-tuned model")
    prompts = chat_prompts(config.counts, config.seed)
    path, loops, dropped = config.out / "texts.jsonl", 0, 0
    with self_texts.texts_file(path, self_texts.Plan(base, len(prompts), settings)) as (there, file):
        pending = [index for index in range(len(prompts)) if index not in there]
        for first in range(0, len(pending), config.batch_size):
            chosen = pending[first : first + config.batch_size]
            encoded = [tokenizer.encode_chat(prompts[index].text) for index in chosen]
            warm = [0.0 if index % 2 == 0 and not prompts[index].again else config.temperature for index in chosen]
            output = decode_fn(params, encoded, [config.seed + index for index in chosen], temperature=warm)
            written = [
                self_texts.filtered(index, prompts[index].split, prompt, tokens[:length].tolist())
                for index, prompt, tokens, length in zip(chosen, encoded, output.tokens, output.lengths, strict=True)
            ]
            self_texts.append(file, written)
            loops += sum(text.loops for text in written)
            dropped += sum(not text.tokens for text in written)
            done = len(there) + first + len(chosen)
            print(f"{done}/{len(prompts)} texts; {loops} ran in circles, {dropped} of them dropped", flush=True)
    return path


def store_hidden(config: GenerateConfig, loader: Any, base: Any, path: Path) -> None:
    """Stores what is missing of the hidden states over the texts."""
    from finetune.hidden_store import store, stored
    from finetune.self_texts import as_rows, fingerprint, read_texts

    model, params, _ = loader.model(config.model)
    texts = read_texts(path, base)
    if not texts:
        raise InputError(f"every text in {path} ran in circles and was dropped: write longer or warmer ones")
    rows, mark, folder = as_rows(texts), fingerprint(texts), config.out / "hidden"
    layers = tuple(sorted({*config.layers, model.config.num_layers}))
    if set(layers) <= set(stored(folder, base, mark)):
        print(f"hidden states are there already: {folder}")
        return

    def report(done: int) -> None:
        if done % 80 == 0 or done == len(texts):
            print(f"hidden states of {done}/{len(texts)} texts", flush=True)

    store(folder, model, params, base, rows, mark, layers, report=report)


def main(argv: list[str] | None = None) -> None:
    """Loads the config and the model, writes texts and hidden states."""
    config = load_config(GenerateConfig, argv, prog=_PROG, description=(__doc__ or "").split("\n")[0])
    setup_runtime()
    run(config)
    print(f"saved in {config.out}/")


def ensure_texts(folder: Path, config: Path | None, model: str, dtype: Any) -> None:
    """Lets a model write texts, by a config of this main, where that is not done yet.

    Args:
        folder: of the texts.
        config: for everything but model, dtype and folder; None: nothing is written.
        model: that writes.
        dtype: of the model.
    """
    if config is None or ((folder / "texts.jsonl").is_file() and (folder / "hidden" / "about.json").is_file()):
        return
    print(f"generating texts first ({config})", flush=True)
    made = load_config(GenerateConfig, ["--config", str(config)], prog=_PROG, description="")
    run(dataclasses.replace(made, model=model, dtype=dtype, out=folder))


def run(config: GenerateConfig) -> None:
    """Writes what is missing of texts and hidden states."""
    from experiments.loading import Loader
    from finetune.adapters.saved import base_of

    loader = Loader(config.dtype)
    with locked(config.out, "--out"):
        base = base_of(config.model, loader.model(config.model)[1])
        store_hidden(config, loader, base, write_texts(config, loader, base))


if __name__ == "__main__":
    run_main(main)
