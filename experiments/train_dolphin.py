"""What a training run of a Dolphin pair (2408.15518) has of its own: two decoders, contexts beside rows, one file."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.base_model import Base
    from experiments.prepared_run import Run
    from experiments.train_config import TrainConfig

FILE = "dolphin.safetensors"


@dataclasses.dataclass(frozen=True)
class DolphinTraining:
    """A compressor beside the model that is trained."""

    compressor: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    memory: int = 32  # memory tokens; a file to start from has its own number
    start: Path | None = None  # the file of an earlier stage; null: new memory and projector

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")


def load_pair(config: "TrainConfig", base: "Base", mesh: Any) -> "Base":
    """Returns a loaded decoder with a compressor before it, new or as an earlier stage left them."""
    import jax

    from models.dolphin import Dolphin, DolphinConfig, with_memory
    from models.encoder_decoder import decoder_only
    from models.errors import InputError
    from models.weights.load import load_model

    settings = config.dolphin
    small, values, tokenizer = load_model(settings.compressor, config.dtype, mesh)
    if tokenizer is None:
        raise InputError(f"{settings.compressor} has no tokenizer.json: put the model's into the folder")
    main = decoder_only(base.model, "a compressor's main decoder")
    decoder_only(small, "compressing")
    bases = _bases(settings.compressor, values, base)
    if settings.start is None:
        model = Dolphin(DolphinConfig(small.config, main.config, settings.memory), config.remat)
        params = with_memory(model, jax.random.key(config.seed), values, base.params)
    else:
        from finetune.saved_dolphin import load_dolphin

        model, params = load_dolphin(settings.start, bases, (small, values), (main, base.params))
        model = Dolphin(model.config, config.remat)
    return base._replace(model=model, params=params, reader=tokenizer, bases=bases)


def _bases(name: str, values: Any, base: "Base") -> Any:
    from finetune.adapters.saved import base_of
    from finetune.saved_dolphin import Bases

    return Bases(base_of(name, values), base_of(base.name, base.params))


def save_pair(config: "TrainConfig", run: "Run", frozen: Any, trainable: Any) -> None:
    """Writes the trained pair into the run's folder.

    A stage that started from a file has adapted what an earlier one left: its pair is written whole.
    """
    from finetune.saved_dolphin import save_dolphin

    path, merged = config.run_dir / FILE, run.method.merge(run.constants.base, frozen, trainable)
    if config.adapter is None or config.dolphin.start is not None:
        save_dolphin(path, merged, run.belongs_to, None)
    else:
        save_dolphin(path, merged, run.belongs_to, config.adapter, frozen, trainable["adapter"])
