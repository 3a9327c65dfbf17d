"""What the knob's table is told (`experiments.knob_table`)."""

import dataclasses
from typing import Literal

from experiments.table_config import TableFrame
from experiments.train_config import TrainConfig
from finetune.adapters import LoraConfig
from finetune.context_tasks import FAMILIES


@dataclasses.dataclass(frozen=True)
class KnobSize:
    """How much is measured."""

    steps: int = 150  # updates of LoRA
    train: int = 256  # items to train on, at most
    test: int = 64  # items to test on, at most
    search: int = 16  # pairs for the search of layers
    direction_steps: int = 200  # updates of a direction
    layers: tuple[float, ...] = (0.4, 0.5, 0.6)  # candidates beside the search's own, as shares of the depth

    def __post_init__(self) -> None:
        if min(self.steps, self.train, self.test, self.search, self.direction_steps) < 1:
            raise ValueError("steps, train, test, search and direction_steps must be at least 1")
        if not all(0 <= share < 1 for share in self.layers):
            raise ValueError("layers must be shares of the depth, from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class KnobPresets:
    """The sizes that a table can be run at."""

    smoke: KnobSize = KnobSize(2, 8, 4, 2, 4, (0.5,))
    cpu: KnobSize = KnobSize()
    gpu: KnobSize = KnobSize(600, 2048, 512, 64, 600)


@dataclasses.dataclass(frozen=True)
class KnobClaim:
    """Something the paper says: the figure `measure` of `row` is at least `least`."""

    text: str = ""
    row: str = ""
    measure: str = ""
    least: float = 0.0


@dataclasses.dataclass(frozen=True)
class KnobTableConfig(TableFrame):
    """The table."""

    type: Literal["knob"] = "knob"
    table: str = "context_knob"
    model: str = "smollm2-135m-instruct"  # a registry name or a model folder
    families: tuple[str, ...] = FAMILIES  # what is asked (finetune.context_tasks)
    contexts: int = 4  # of each query
    known_only: bool = True  # ask only where the untuned model prefers the right answer to others of its family
    run: TrainConfig = TrainConfig(
        adapter=LoraConfig(rank=64, alpha=16.0)
    )  # model, data, steps, folder are the table's
    claims: tuple[KnobClaim, ...] = ()
    paper: dict[str, str] = dataclasses.field(default_factory=dict)  # what the paper reports, by row
    presets: KnobPresets = KnobPresets()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.run.adapter is None:
            raise ValueError("run.adapter must name an adapter: the untuned model is compared with it")
