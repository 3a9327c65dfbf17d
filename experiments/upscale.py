"""Grows a checkpoint: `python -m experiments.upscale --model smollm2-135m-instruct --layers 45 --out runs/deeper`.

More layers, by doubling some (Yi, 2403.04652): those that are named, or as many as are missing, where what enters a
layer and what leaves it are most alike on the texts of `data`. A longer context, by a larger base of the rotary
positions. OUT is a model folder to be trained on: `experiments.train --model OUT` with `adapter: null` in its config.
"""

import dataclasses
from pathlib import Path

from experiments.config import load_config
from experiments.runtime import run_main, setup_runtime
from finetune.data_configs import DataConfig, GeneratedData
from models.errors import InputError
from models.growth import GrowthConfig

_ROWS, _LENGTH = 64, 128  # rows that layers are compared on, and tokens of each at most


@dataclasses.dataclass(frozen=True)
class UpscaleConfig:
    """A checkpoint to be grown."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    out: Path = Path("runs/upscaled")  # the new model folder; must not be there
    layers: int | None = None  # in all; which are doubled is measured. None: as growth says
    growth: GrowthConfig = GrowthConfig()
    data: DataConfig = GeneratedData()  # texts that layers are compared on

    def __post_init__(self) -> None:
        if self.layers is not None and self.growth.double is not None:
            raise ValueError("set layers, or growth.double, not both")


def upscale(config: UpscaleConfig) -> list[str]:
    """Writes the grown model; returns what was done, in lines.

    Raises:
        InputError: the model cannot be read, what is asked does not fit it, or `out` is there.
    """
    from models.growth import doubled_order, grow
    from models.weights.load import load_model
    from models.weights.orbax import save_model

    if config.layers is None and config.growth == GrowthConfig():
        raise InputError("nothing is to grow: set layers, growth.double, growth.rope_theta or growth.max_length")
    if config.out.exists():
        raise InputError(f"{config.out} exists already; choose another folder with --out, or remove it first")
    model, params, tokenizer = load_model(config.model)
    growth, lines = config.growth, []
    if config.layers is not None:
        double, lines = _choose(config, model, params, tokenizer)
        growth = dataclasses.replace(growth, double=double)
    grown, params = grow(model, params, growth)
    save_model(config.out, grown, params, tokenizer)
    order = doubled_order(model.config.num_layers, growth)
    return [
        *lines,
        f"layers: {' '.join(map(str, order))}",
        f"{model.config.num_layers} layers became {grown.config.num_layers}, "
        f"{model.config.max_length} tokens of context {grown.config.max_length}",
        f"saved in {config.out}",
    ]


def _choose(config: UpscaleConfig, model, params, tokenizer) -> tuple[tuple[int, int], list[str]]:
    """Returns (the layers to double, lines about how alike each layer leaves what enters it)."""
    import jax.numpy as jnp

    from finetune.data import read_data
    from models.growth import layer_cosines, most_alike

    more = config.layers - model.config.num_layers
    if not 1 <= more <= model.config.num_layers:
        least, most = model.config.num_layers + 1, 2 * model.config.num_layers
        raise InputError(f"layers must be {least} to {most} for this model, got {config.layers}")
    if tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer.json: put the model's tokenizer.json into the folder")
    rows = read_data(config.data, tokenizer, min(_LENGTH, model.config.max_length)).train
    length = min(_LENGTH, model.config.max_length, len(rows.tokens))
    count = min(_ROWS, len(rows.tokens) // length)
    texts = rows.tokens[: count * length].reshape(count, length)  # texts one behind the other
    cosines = layer_cosines(model, params, jnp.asarray(texts))
    lines = [f"layer {index:>3}  cosine {float(value):.4f}" for index, value in enumerate(cosines)]
    return most_alike(cosines, more), lines


def main(argv: list[str] | None = None) -> None:
    """Loads the config, grows the model, prints what was done."""
    config = load_config(
        UpscaleConfig, argv, prog="python -m experiments.upscale", description=(__doc__ or "").split("\n")[0]
    )
    setup_runtime()
    print("\n".join(upscale(config)))


if __name__ == "__main__":
    run_main(main)
