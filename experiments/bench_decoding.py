"""Times decoding: ours beside Hugging Face generate. Started by `experiments.bench`.

Our jitted greedy decoding (with `beams` above 1: beam search) and, where torch and transformers can be imported,
Hugging Face generate, on the same weights, dtype, prompts and token counts, in alternation in one run. Times of a run
are medians over its repeats; every repeat decodes all prompts, and both sides count the same new tokens. A decode
step's bandwidth is the bytes of the parameters it reads over the time it takes, and its share is taken of the read
bandwidth measured here, between the repeats of the same run.

The last line printed is one JSON object. Keys that need transformers are null without it.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.config import save_page
from experiments.runtime import machine, setup_runtime
from experiments.timed import TimedDecode, alternate
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """One benchmark of decoding."""

    type: Literal["decode"] = "decode"
    model: str = "smollm2-135m-instruct"  # a registry name, a .gguf file, or a model folder
    prompts: tuple[str, ...] = ("Why is the sky blue?",)  # decoded one by one
    max_new_tokens: int = 64  # every prompt gets exactly this many
    beams: int = 1  # above 1: beam search of this width on both sides, in place of greedy decoding
    repeats: int = 5  # timed repeats, after one that is not counted
    bandwidth_bytes: int = 1 << 30  # size of the array whose reading gives the memory bandwidth
    out: Path = Path("results/decode_bench/cpu")  # where the page goes

    def __post_init__(self) -> None:
        if min(self.repeats, self.beams) < 1 or self.max_new_tokens < 2 or not self.prompts:
            raise ValueError(
                "repeats and beams must be at least 1, max_new_tokens at least 2, and there must be a prompt"
            )


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one repeat over all prompts."""

    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """Prompt and decoding."""
        return self.prefill + self.decode


class Bandwidth:
    """The memory read bandwidth of this machine: the time of a sum over one large array."""

    def __init__(self, num_bytes: int):
        """Makes the array and compiles the sum."""
        import jax
        import jax.numpy as jnp

        self.array = jnp.ones((max(1, num_bytes // 4),), jnp.float32)
        self.total = jax.jit(jnp.sum)

    def __call__(self) -> float:
        """Returns bytes per second: the median of three readings."""
        seconds = [_seconds(lambda: self.total(self.array).block_until_ready()) for _ in range(3)]
        return self.array.nbytes / statistics.median(seconds)


class Ours:
    """Our greedy decoding or beam search, compiled before it is timed."""

    def __init__(self, model: Any, params: Any, prompts: Sequence[Sequence[int]], new_tokens: int, beams: int = 1):
        """Compiles for every bucket among the prompts."""
        from decoding import make_decode_fn

        method: dict[str, Any] = {"method": "greedy"} if beams == 1 else {"method": "beam", "width": beams}
        self.decode_fn = make_decode_fn(model, max_new_tokens=new_tokens, **method)
        self.inputs = [self.decode_fn.inputs([prompt]) for prompt in prompts]
        if any(call.limit[0] < new_tokens for _, call in self.inputs):
            raise InputError(
                f"a prompt and {new_tokens} new tokens do not fit the model's context: lower max_new_tokens"
            )
        self.timed = TimedDecode(self.decode_fn, params)
        for item in self.inputs:
            self.timed.compile(item)

    def __call__(self) -> tuple[Timing, list[list[int]]]:
        """Decodes every prompt once."""
        prefill = decode = 0.0
        tokens = []
        for inputs in self.inputs:
            state, seconds = self.timed(inputs)
            prefill, decode = prefill + seconds.prefill, decode + seconds.decode
            tokens.append(state.tokens[0, : int(state.lengths[0])].tolist())
        return Timing(prefill, decode), tokens


class Transformers:
    """Hugging Face generate with the same weights, greedy or with beams, with its key/value cache."""

    def __init__(self, path: Any, prompts: Sequence[Sequence[int]], new_tokens: int, beams: int = 1):
        """Loads the model; raises ImportError where torch or transformers is missing."""
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        if path.is_file():
            where, extra = path.parent, {"gguf_file": path.name}
        else:
            where, extra = path, {}
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **extra)
        self.torch, self.model, self.new_tokens, self.beams = torch, model.eval(), new_tokens, beams
        self.prompts = [torch.tensor([list(prompt)]) for prompt in prompts]

    def _generate(self, ids: Any, new_tokens: int) -> Any:
        settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "num_beams": self.beams}
        mask = self.torch.ones_like(ids)
        counts = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        with self.torch.inference_mode():
            return self.model.generate(ids, attention_mask=mask, **counts, **settings)

    def __call__(self) -> tuple[Timing, list[list[int]]]:
        """Generates for every prompt once; `prefill` is the time of a call for a single token."""
        prefill = total = 0.0
        tokens = []
        for ids in self.prompts:
            prefill += _seconds(lambda ids=ids: self._generate(ids, 1))
            begin = time.perf_counter()
            out = self._generate(ids, self.new_tokens)
            total += time.perf_counter() - begin
            tokens.append(out[0, ids.shape[1] :].tolist())
        return Timing(prefill, total - prefill), tokens


def summarise(
    config: BenchConfig, bytes_per_step: int, bandwidths: list[float], ours: list[Timing], theirs: list[Timing]
) -> dict[str, Any]:
    """Returns the figures of the last line: medians over the repeats, and ratios of medians."""
    bandwidth = statistics.median(bandwidths)
    count = len(config.prompts) * config.max_new_tokens
    total = statistics.median(t.total for t in ours)
    step = statistics.median(t.decode for t in ours) / count
    result = {
        "speedup_vs_transformers": None,
        "bandwidth_share": bytes_per_step / step / bandwidth,
        "tokens_per_second": count / total,
        "decode_step_ms": 1e3 * step,
        "prefill_ms": 1e3 * statistics.median(t.prefill for t in ours) / len(config.prompts),
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "transformers_tokens_per_second": None,
        "repeats": config.repeats,
        "new_tokens_per_repeat": count,
    }
    if theirs:
        their_total = statistics.median(t.total for t in theirs)
        result["speedup_vs_transformers"] = their_total / total
        result["transformers_tokens_per_second"] = count / their_total
    return result


def _seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _theirs(path: Any, prompts: Sequence[Sequence[int]], new_tokens: int, beams: int) -> Transformers | None:
    """Returns the other side, or None, with the reason printed, where it cannot be measured fairly."""
    import jax

    if jax.default_backend() != "cpu":
        print("transformers is not measured: it would run on the CPU, and this run does not")
        return None
    try:
        return Transformers(path, prompts, new_tokens, beams)
    except ImportError as error:
        print(f"transformers is not measured: {error}. `pip install -e '.[parity]'` brings it.")
    except (OSError, ValueError) as error:
        print(f"transformers is not measured: it cannot read {path}: {str(error).splitlines()[0]}")
    return None


def bench_decoding(config: BenchConfig) -> None:
    """Loads the model on both sides, times them in turn and prints the figures."""
    setup_runtime()
    import jax

    from models import load_model
    from models.weights.load import find_model

    model, params, tokenizer = load_model(config.model, "float32")
    if tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer.json: put the model's tokenizer.json into the folder")
    encode = tokenizer.encode_chat if tokenizer.chat_template else tokenizer.encode
    prompts = [encode(prompt) for prompt in config.prompts]
    sides: list[Any] = [Ours(model, params, prompts, config.max_new_tokens, config.beams)]
    theirs = _theirs(find_model(config.model), prompts, config.max_new_tokens, config.beams)
    sides += [theirs] if theirs is not None else []
    _report_equality(sides)
    bandwidths, *results = alternate([Bandwidth(config.bandwidth_bytes), *sides], config.repeats)
    timings = [[timing for timing, _ in kept] for kept in results]
    for name, kept in zip(("fleetlm", "transformers"), timings, strict=False):
        seconds = ", ".join(f"{t.prefill:.2f}+{t.decode:.2f}" for t in kept)
        print(f"{name:<13} seconds per repeat (prefill+decode): {seconds}")
    print(f"read bandwidth, GB/s: {', '.join(f'{b / 1e9:.1f}' for b in bandwidths)}")
    looked_up = {"positions"} | (set() if model.config.tied_embeddings else {"embedding"})  # a column each per step
    read = {name: part for name, part in params.items() if name not in looked_up}
    bytes_per_step = sum(x.nbytes for x in jax.tree.leaves(read))
    figures = summarise(config, bytes_per_step, bandwidths, timings[0], timings[1] if theirs is not None else [])
    save_page(config, page(config, figures))
    print(json.dumps({"model": config.model, "device": jax.devices()[0].device_kind, **figures}))


def page(config: BenchConfig, figures: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    what = f"Beam search with {config.beams} beams" if config.beams > 1 else "Greedy decoding"
    lines = [
        f"# {what}, batch 1\n\n{Path(config.model).name}, float32; {len(config.prompts)} prompts, "
        f"{config.max_new_tokens} new tokens each, medians of {config.repeats} repeats. {machine()}\n",
        "| | new tokens per second of prompt and decoding |\n| --- | --- |",
        f"| here | {figures['tokens_per_second']:.1f} |",
    ]
    if figures["speedup_vs_transformers"] is not None:
        lines.append(f"| transformers | {figures['transformers_tokens_per_second']:.1f} |")
        lines.append(f"\n- Beside transformers, in turns: {figures['speedup_vs_transformers']:.2f} times the speed.")
    lines.append(
        f"\n- A step takes {figures['decode_step_ms']:.1f} ms and reads the parameters at "
        f"{100 * figures['bandwidth_share']:.0f} % of the {figures['bandwidth_gb_per_s']:.1f} GB/s that were read "
        "between the repeats."
    )
    return "\n".join(lines) + "\n"


def _report_equality(sides: Sequence[Callable[[], tuple[Timing, list[list[int]]]]]) -> None:
    """Says whether both sides give the same tokens: a speed comparison of different texts would mean little."""
    if len(sides) == 2:
        ours, theirs = (side()[1] for side in sides)
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(f"prompts with the same tokens on both sides: {same} of {len(ours)}")
