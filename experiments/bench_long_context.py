"""Times decoding behind long contexts.

    python -m experiments.bench_long_context --config configs/bench/long_context.yaml

For every method and context length, batch 1, float32, on the model's own weights:

    attention   seconds per step of the attention of all layers alone, between random queries and a random cache
    step        seconds per step of the whole decoder behind such a cache

A cache of random keys and values costs what a text's does, and spares the time of reading one. Methods take turns
inside a run, and every figure is the median over its repeats. The first method is what the others are compared with.

The last line printed is one JSON object; the same figures go to a page that `experiments.results` takes up.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config import load_config, save_page
from experiments.loading import Loader
from experiments.runtime import machine, run_main, setup_runtime
from experiments.timed import alternate
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Side:
    """A method and how it is set."""

    name: str = "dense"
    method: str = "sample"  # one that takes a temperature, which is 0 here
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # the method's own static options


@dataclasses.dataclass(frozen=True)
class LongContextBenchConfig:
    """One benchmark of long contexts."""

    model: str = "qwen2.5-coder-0.5b-instruct"  # a registry name, a .gguf file, or a model folder
    contexts: tuple[int, ...] = (4096, 16384)  # tokens in the cache before the first step, in rising order
    sides: tuple[Side, ...] = (Side(),)
    steps: int = 16  # of one repeat
    repeats: int = 5  # timed repeats, after one that is not counted
    out: Path = Path("results/long_context_bench/cpu")

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1 or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts must be numbers of tokens in rising order, got {list(self.contexts)}")
        if not self.sides or len({side.name for side in self.sides}) != len(self.sides):
            raise ValueError("sides must have names of their own, and there must be at least one")
        if self.steps < 1 or self.repeats < 1:
            raise ValueError("steps and repeats must be at least 1")


class Attention:
    """The attention of all layers for some steps: each layer's queries wait for the layer before, as in the model."""

    def __init__(self, decode_fn: Any, context: int, steps: int):
        """Compiles for a context."""
        import jax

        self.policy, self.steps = decode_fn.plan.steps().policy, steps
        self.layers = [block.attention for block in decode_fn.plan.model.config.blocks]
        self.begin = jax.jit(functools.partial(self._begin, context))
        self.run = jax.jit(self._run, donate_argnums=(0, 1))

    def _begin(self, context: int) -> tuple[Any, Any, Any]:
        import jax
        import jax.numpy as jnp

        shapes = [(self.steps, 1, 1, config.num_heads, config.head_dim) for config in self.layers]
        queries = [jax.random.normal(jax.random.key(layer), shape) for layer, shape in enumerate(shapes)]
        cache = random_cache(self.layers, context, context + self.steps, jnp.float32)
        return self.policy.keep(cache), self.policy.init(cache), queries

    def _run(self, cache: Any, memory: Any, queries: Any) -> tuple[Any, Any, Any]:
        import jax
        import jax.numpy as jnp

        from models.attention import TreeRows

        def step(index: jax.Array, carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
            cache, memory, last = carry
            rows = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32), memory)
            for layer, config in enumerate(self.layers):
                q = queries[layer][index] + 1e-6 * last
                new = q[:, :, : config.num_kv_heads]
                out, kept, rows = self.policy.attend(q, new, new, cache.layer(layer), rows, config=config, layer=layer)
                cache, last = cache.with_layer(layer, kept), out.mean()
            return cache.replace(length=cache.length + 1), rows.memory, last

        return jax.lax.fori_loop(0, self.steps, step, (cache, memory, jnp.zeros(())))

    def __call__(self) -> float:
        """Returns seconds per step."""
        return _seconds(self.run, *self.begin()) / self.steps


class Step:
    """Whole decoding steps behind a cache of random keys and values."""

    def __init__(self, decode_fn: Any, params: Any, context: int, steps: int):
        """Compiles for a context."""
        import jax

        self.decode_fn, self.params, self.steps = decode_fn, params, steps
        self.begin = jax.jit(functools.partial(self._begin, context))

    def _begin(self, context: int, params: Any, prompts: Any, call: Any) -> Any:
        from decoding.state import init_state

        plan = self.decode_fn.plan
        steps, layers = plan.steps(), [block.attention for block in plan.model.config.blocks]
        cache = random_cache(layers, context, plan.cache_slots, params["embedding"]["embedding"].dtype)
        carry = steps.init(params, prompts, cache, call)
        cache = steps.policy.keep(cache)
        return init_state(cache, prompts.tokens[:, 0], call.limit, plan.room, steps.most, carry)

    def __call__(self) -> float:
        """Returns seconds per step."""
        state = self.begin(self.params, *self.decode_fn.inputs([[1]], temperature=0.0))
        return _seconds(self.decode_fn.advance, self.params, state) / self.steps


def random_cache(layers: Sequence[Any], context: int, num_slots: int, dtype: Any) -> Any:
    """Returns a cache of one row with `context` tokens and random keys and values."""
    import jax
    import jax.numpy as jnp

    from models.cache import init_cache

    cache = init_cache(layers, 1, num_slots, dtype)
    keys = [jax.random.key(index) for index in range(2 * len(layers))]
    k = tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, cache.k, strict=False))
    v = tuple(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys[len(k) :], cache.v, strict=True))
    return cache.replace(k=k, v=v, length=jnp.full((1,), context, jnp.int32))


def measure(config: LongContextBenchConfig, model: Any, params: Any) -> dict[str, Any]:
    """Returns {"attention" or "step": {context: {side: milliseconds per step}}}.

    Raises:
        InputError: a context that the model was not made for, or options that do not fit it.
    """
    from decoding import make_decode_fn

    if config.contexts[-1] + config.steps > model.config.max_length:
        raise InputError(
            f"contexts must leave room for {config.steps} steps in the model's {model.config.max_length} tokens, got "
            f"{config.contexts[-1]}: lower it"
        )
    figures: dict[str, Any] = {"attention": {}, "step": {}}
    for context in config.contexts:
        sizes = {"max_new_tokens": config.steps, "cache_slots": context + config.steps}
        made = [make_decode_fn(model, side.method, **sizes, **side.options) for side in config.sides]
        for side, steps in zip(config.sides, [decode_fn.plan.steps() for decode_fn in made], strict=True):
            if steps.most > 1 or steps.looks_on:
                raise InputError(
                    f"side {side.name!r} drafts, or fits weights to prompts: steps of one token are measured, behind a "
                    "cache that no prompt filled. Leave out drafted, or choose a method that attends in its own way"
                )
        timers = {
            "attention": [Attention(decode_fn, context, config.steps) for decode_fn in made],
            "step": [Step(decode_fn, params, context, config.steps) for decode_fn in made],
        }
        for what, sides in timers.items():
            seconds = alternate(sides, config.repeats)
            medians = {
                side.name: 1e3 * statistics.median(kept) for side, kept in zip(config.sides, seconds, strict=True)
            }
            figures[what][context] = medians
            print(
                f"{what} behind {context} tokens, ms:",
                {name: round(time, 2) for name, time in medians.items()},
                flush=True,
            )
    return figures


def page(config: LongContextBenchConfig, figures: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    first = config.sides[0].name
    lines = [f"# Decoding behind long contexts\n\n{Path(config.model).name}, float32, batch 1. {machine()}\n"]
    columns = [f"{context} tokens" for context in config.contexts]
    for what, title in (("attention", "Attention of all layers"), ("step", "Whole step")):
        lines += [f"{title}, ms per step (times faster than {first}):\n"]
        lines += [f"| | {' | '.join(columns)} | growth |", f"|{' --- |' * (len(columns) + 2)}"]
        for side in config.sides:
            row = [figures[what][context] for context in config.contexts]
            cells = [f"{times[side.name]:.1f} ({times[first] / times[side.name]:.2f})" for times in row]
            lines.append(f"| {side.name} | {' | '.join(cells)} | {row[-1][side.name] / row[0][side.name]:.2f} |")
        lines.append("")
    lines += [f"- {side.name}: {side.method} {json.dumps(side.options)}" for side in config.sides]
    return "\n".join(lines) + "\n"


def _seconds(run: Any, *args: Any) -> float:
    """Returns how long a call takes whose arguments are ready."""
    import jax

    jax.block_until_ready(args)
    begin = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and saves the figures."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m experiments.bench_long_context"
    config = load_config(LongContextBenchConfig, argv, prog=prog, description=(__doc__ or "").split("\n")[0])
    setup_runtime()
    model, params, _ = Loader("float32").model(config.model)
    figures = measure(config, model, params)
    text = page(config, figures)
    save_page(config, text)
    print(f"{text}\n{json.dumps(figures)}")


if __name__ == "__main__":
    run_main(main)
