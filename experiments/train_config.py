"""What a training run is told: one frozen dataclass, with sections for data, adapter, objective and the rest."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.train_dolphin import DolphinTraining
from finetune.adapters import AdapterConfig, LoraConfig
from finetune.data_configs import DataConfig, GeneratedData, OwnTextsData
from finetune.distributed import DistributedConfig
from finetune.objective_configs import CrossEntropyConfig, ObjectiveConfig
from finetune.optimizers import OptimizerConfig
from models.growth import GrowthConfig
from models.joined import JoinConfig
from models.scratch import ScratchConfig
from models.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured on held-out data while training."""

    every: int = 200  # updates; 0: only at the end
    batches: int = 8  # of held-out rows whose loss is measured, at most; 0: no loss
    examples: int = 64  # held-out prompts that are answered, greedily, and compared with their completions
    max_new_tokens: int = 32  # of an answer

    def __post_init__(self) -> None:
        if min(self.every, self.batches, self.examples) < 0 or self.max_new_tokens < 1:
            raise ValueError("every, batches and examples must not be negative, and max_new_tokens at least 1")


@dataclasses.dataclass(frozen=True)
class Saving:
    """Checkpoints."""

    every: int = 200  # updates; the last one is saved too
    keep: int = 2  # of the newest

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be at least 1")


@dataclasses.dataclass(frozen=True)
class Profile:
    """A trace of jax.profiler, written to the run's folder (profile/)."""

    start_step: int = 0  # updates made before it starts
    num_steps: int = 0  # updates traced; 0: no trace

    def __post_init__(self) -> None:
        if self.start_step < 0 or self.num_steps < 0:
            raise ValueError("start_step and num_steps must not be negative")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    scratch: ScratchConfig | None = None  # a new model of this shape in place of `model`
    growth: GrowthConfig | None = None  # makes `model` deeper, or its context longer, before it is trained
    join: JoinConfig | None = None  # an encoder in front of `model`, which stays as it is: only what is new is trained
    dtype: Literal["float32", "bfloat16"] | None = None  # of the frozen model; None: as stored (GGUF: float32)
    adapter: AdapterConfig | None = LoraConfig()  # what is trained; null: every parameter
    data: DataConfig = GeneratedData()
    objective: ObjectiveConfig = CrossEntropyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 200  # updates in all
    batch_size: int = 8  # rows of an update, over all devices and micro-batches
    accumulate: int = 1  # micro-batches of an update
    length: int = 128  # tokens of a row
    dolphin: DolphinTraining | None = None  # a compressor of contexts that is trained before `model`
    source_length: int | None = None  # tokens that an encoder reads beside a row, at most; null: as many as `length`
    packing: bool = True  # several texts in a row; false: one text in a row, padded (as an encoder needs it)
    remat: bool = False  # compute blocks again in the backward pass: less memory, a third more work
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: Evaluation = Evaluation()
    saving: Saving = Saving()
    profile: Profile = Profile()
    log_every: int = 10  # updates
    seed: int = 0  # of new weights and of the order of rows
    run_dir: Path = Path("runs/train")  # config, metrics, checkpoints, what was trained; a run in it goes on
    dry_run: bool = False  # print sizes and shardings for the mesh, load and train nothing

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")
        if self.source_length is not None and self.source_length < 1:
            raise ValueError(f"source_length must be at least 1 (or null for `length`), got {self.source_length}")
        if self.scratch is not None and self.adapter is not None:
            raise ValueError("a new model (scratch) is trained whole: set adapter to null")
        if self.join is not None and (self.scratch is not None or self.adapter is not None):
            raise ValueError("join is of two trained models (scratch: null), and trains the encoder (adapter: null)")
        if self.dolphin is not None and self.adapter is not None and self.adapter.type != "lora":
            raise ValueError("a pair of decoders (dolphin) is trained with the adapter lora, or whole (adapter: null)")
        if isinstance(self.data, OwnTextsData) and [self.scratch, self.growth, self.join, self.dolphin] != [None] * 4:
            raise ValueError("own_texts are what `model` writes as it is: leave out scratch, growth, join and dolphin")
        if self.growth is not None and (self.scratch is not None or self.adapter is not None):
            raise ValueError(
                "growth is of a trained model (scratch: null), and of what is trained whole (adapter: null)"
            )


def check_shared(name: str, run: TrainConfig) -> None:
    """Raises ValueError where what rows of a table share has settings that each row has of its own."""
    for setting in ("objective", "growth", "seed"):
        if getattr(run, setting) != getattr(TrainConfig(), setting):
            raise ValueError(f"{name}.{setting} would not be read: every row has its own")
