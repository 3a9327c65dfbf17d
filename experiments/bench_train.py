"""Times training: a LoRA update of every linear layer, ours beside torch with PEFT, from the same weights and data.

Each side lives in a process of its own, so that its peak memory is its own, and the two take turns: one trains while
the other waits. Peak memory counts from the first update on (compiling included), not the reading of the model. The
host's share is the processor time of the Python thread that runs the training loop, over the time that passes.
"""

import contextlib
import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiments.bench_process import Repeat, Side
from experiments.config import save_page
from experiments.runtime import machine
from experiments.timed import alternate

if TYPE_CHECKING:
    from finetune.packing import Batches

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class TrainBenchConfig:
    """One benchmark of training: AdamW in float32, gradients clipped to a norm of 1."""

    type: Literal["train"] = "train"
    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    batch_size: int = 4  # rows of an update
    length: int = 128  # tokens of a row, drawn at random
    rank: int = 8  # of the LoRA on every linear layer; alpha = rank
    steps: int = 3  # updates of a repeat
    repeats: int = 5  # timed repeats, after one that is not counted
    out: Path = Path("results/train_bench/cpu")  # where the page goes

    def __post_init__(self) -> None:
        if min(self.batch_size, self.rank, self.steps, self.repeats) < 1 or self.length < 2:
            raise ValueError("batch_size, rank, steps and repeats must be at least 1, length at least 2")


def drawn_batches(config: TrainBenchConfig, vocab_size: int) -> "Batches":
    """Returns the batches of all updates, rows of random tokens that fill their length: the same for both sides."""
    from finetune.packing import Batches
    from finetune.rows import Row, stack

    shape = (config.batch_size * config.steps * (config.repeats + 1), config.length)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int32)
    targets = [index > 0 for index in range(config.length)]
    rows = stack([Row(row.tolist(), targets) for row in tokens])
    return Batches(rows, batch_size=config.batch_size, length=config.length)


class Ours:
    """This project's trainer."""

    def __init__(self, config: TrainBenchConfig):
        """Loads the model and makes the first state."""
        import jax

        from experiments.runtime import setup_runtime
        from experiments.train_report import CompiledStep
        from finetune.adapters import LoraConfig, make_adapter
        from finetune.adapters.adapter import select
        from finetune.objectives import cross_entropy
        from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
        from finetune.state import Constants, adapter_tuning, new_state
        from finetune.trainer import make_train_step
        from models import load_model
        from models.sharding import MeshConfig, build, make_mesh, place

        setup_runtime()
        self.config = config
        self.mesh = make_mesh(MeshConfig())
        self.model, params, _ = load_model(config.model, "float32", self.mesh)
        lora = LoraConfig(rank=config.rank)
        adapter = make_adapter(lora)
        frozen, trainable = adapter.init(jax.random.key(0), select(params, lora.targets), None)
        total = config.steps * (config.repeats + 1)
        settings, method = OptimizerConfig(learning_rate=_RATE, schedule="constant", warmup=0), adapter_tuning(adapter)
        optimizer = make_optimizer(settings, total, method)
        schedule = learning_rate(settings, total)
        self.batches = drawn_batches(config, self.model.config.vocab_size)
        self.step = CompiledStep(make_train_step(self.model, cross_entropy(), method, optimizer, schedule, self.mesh))
        with jax.numpy_dtype_promotion("standard"):
            self.state = build(lambda values: new_state(values, optimizer), place(trainable, self.mesh), mesh=self.mesh)
        self.constants = Constants(params, place(frozen, self.mesh), None)
        self.about = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend()}

    def __call__(self) -> Repeat:
        """Makes the next `steps` updates."""
        from finetune.distributed import global_batch
        from finetune.trainer import train

        losses: list[float] = []
        begin, host = time.perf_counter(), time.thread_time()
        end = int(self.state.step) + self.config.steps

        def report(step: int, metrics: dict[str, float]) -> None:
            losses.append(metrics["loss"])

        def batch(step: int) -> Any:
            return global_batch(self.batches(step), self.mesh)

        self.state = train(self.step, self.state, self.constants, batch, end, report)
        return Repeat(time.perf_counter() - begin, time.thread_time() - host, tuple(losses))


class Peft:
    """torch with transformers and PEFT."""

    def __init__(self, config: TrainBenchConfig):
        """Loads the model; raises ImportError where torch, transformers or PEFT is missing."""
        import peft
        import torch
        import transformers

        from models.weights.load import find_model

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        path = find_model(config.model)
        where, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **extra)
        targets = list(_PROJECTIONS)
        lora = peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets, task_type="CAUSAL_LM")
        self.torch, self.config, self.batches = torch, config, drawn_batches(config, model.config.vocab_size)
        self.model = peft.get_peft_model(model, lora).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=_RATE, weight_decay=0.0)
        self.made = 0
        self.about = {"version": f"torch {torch.__version__}, peft {peft.__version__}"}

    def __call__(self) -> Repeat:
        """Makes the next `steps` updates."""
        begin, host = time.perf_counter(), time.thread_time()
        losses = [self._update() for _ in range(self.config.steps)]
        return Repeat(time.perf_counter() - begin, time.thread_time() - host, tuple(losses))

    def _update(self) -> float:
        ids = self.torch.from_numpy(self.batches(self.made).tokens[0]).long()
        self.made += 1
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().item()


@contextlib.contextmanager
def _sides(config: TrainBenchConfig) -> Iterator[list[Side]]:
    """Gives our side and, where it can be measured fairly, the other; the reason is printed where it cannot."""
    sides = [Side(Ours, config)]
    try:
        if sides[0].about["backend"] != "cpu":
            print("PEFT is not measured: it would run on the CPU, and this run does not")
        elif missing := [name for name in ("torch", "transformers", "peft") if not importlib.util.find_spec(name)]:
            print(f"PEFT is not measured: no {', '.join(missing)}. `pip install -e '.[parity]'` brings it.")
        else:
            try:
                sides.append(Side(Peft, config))
            except (ImportError, OSError, ValueError) as error:
                print(f"PEFT is not measured: {str(error).splitlines()[0]}")
        yield sides
    finally:
        for side in sides:
            side.close()


def summarise(config: TrainBenchConfig, repeats: Sequence[Sequence[Repeat]], peaks: Sequence[int]) -> dict[str, Any]:
    """Returns the figures of the last line: medians over the repeats, and ratios of medians; ours come first."""
    tokens = config.batch_size * config.length * config.steps
    seconds = [statistics.median(r.seconds for r in side) for side in repeats]
    ours = repeats[0]
    result = {
        "speedup_vs_peft": None,
        "peak_memory_ratio": None,
        "tokens_per_second": tokens / seconds[0],
        "step_seconds": seconds[0] / config.steps,
        "host_share": statistics.median(r.host / r.seconds for r in ours),
        "peak_memory_gb": peaks[0] / 1e9,
        "peft_tokens_per_second": None,
        "peft_peak_memory_gb": None,
        **{name: getattr(config, name) for name in ("batch_size", "length", "rank", "steps", "repeats")},
    }
    if len(repeats) > 1:
        result["speedup_vs_peft"] = seconds[1] / seconds[0]
        result["peak_memory_ratio"] = peaks[0] / peaks[1]
        result["peft_tokens_per_second"] = tokens / seconds[1]
        result["peft_peak_memory_gb"] = peaks[1] / 1e9
    return result


def bench_training(config: TrainBenchConfig) -> None:
    """Measures both sides in turn and prints the figures."""
    with _sides(config) as sides:
        repeats = alternate(sides, config.repeats)
        peaks, device = [side.peak for side in sides], sides[0].about["device"]
    for name, kept in zip(("fleetlm", "peft"), repeats, strict=False):
        print(f"{name:<8} seconds per update: {', '.join(f'{r.seconds / config.steps:.2f}' for r in kept)}")
    if len(sides) > 1:
        first = " and ".join(f"{side.losses[0]:.4f}" for side in sides)
        print(f"{sides[1].about['version']}; losses of the first update: {first}")
    result = {"model": Path(config.model).name, "device": device, **summarise(config, repeats, peaks)}
    save_page(config, page(result))
    print(json.dumps(result))


def page(result: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    size = f"{result['batch_size']} rows of {result['length']} tokens, rank {result['rank']} on every linear layer"
    lines = [f"# A LoRA update beside torch and PEFT\n\n{result['model']}, float32, {size}. {machine()}\n"]
    lines.append("| | tokens per second | peak memory, GB |\n| --- | --- | --- |")
    lines.append(f"| here | {result['tokens_per_second']:.1f} | {result['peak_memory_gb']:.2f} |")
    if result["speedup_vs_peft"] is not None:
        lines.append(f"| PEFT | {result['peft_tokens_per_second']:.1f} | {result['peft_peak_memory_gb']:.2f} |")
        ratios = f"{result['speedup_vs_peft']:.2f} times the speed, {result['peak_memory_ratio']:.2f} times the memory"
        lines.append(f"\n- Beside PEFT, in turns: {ratios}.")
    lines.append(f"\n- The host's share of an update: {100 * result['host_share']:.1f}%.")
    return "\n".join(lines) + "\n"
