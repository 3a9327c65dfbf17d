"""Timing: sides in turn, and a decode function with compiling, prompt and decoding timed apart.

Methods that are compared on long prompts may share the reading of them (`SharedPrompts`).
"""

import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


def alternate(sides: Sequence[Callable[[], Any]], repeats: int) -> list[list[Any]]:
    """Runs the sides in turn, once without counting and then `repeats` times; returns what each side gave."""
    for side in sides:
        side()
    results: list[list[Any]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, kept in zip(sides, results, strict=True):
            gc.collect()
            kept.append(side())
    return results


class Seconds(NamedTuple):
    """How long one batch took: compiling (0 where nothing new was compiled), the prompts, the new tokens."""

    compile: float
    prefill: float
    decode: float


class SharedPrompts:
    """Caches of prompts, each read densely and once for all methods of one model whose caches are of one size."""

    def __init__(self):
        """Holds none yet."""
        self._compiled: dict[Any, Callable] = {}
        self._kept: dict[Any, tuple[Any, float]] = {}

    def forget(self) -> None:
        """Drops the caches."""
        self._kept.clear()

    def __call__(self, decode_fn: Any, params: Any, prompts: Any) -> tuple[Any, float]:
        """Returns (a copy of the prompts' cache, the seconds that reading them took when they were read)."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from decoding.method import target_params
        from decoding.prefill import prefill

        slots = decode_fn.plan.num_slots(prompts.tokens.shape[1])
        shape = slots, _shapes(prompts)
        key = *shape, *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(prompts))
        if key not in self._kept:
            params = target_params(params)
            if shape not in self._compiled:
                read = jax.jit(functools.partial(prefill, decode_fn.plan.model, num_slots=slots))
                self._compiled[shape] = read.lower(params, prompts=prompts).compile()
            begin = time.perf_counter()
            cache = jax.block_until_ready(self._compiled[shape](params, prompts=prompts))
            self._kept[key] = cache, time.perf_counter() - begin
        cache, seconds = self._kept[key]
        return jax.block_until_ready(jax.tree.map(jnp.copy, cache)), seconds


class TimedDecode:
    """Decodes batches whose arguments `decode_fn.inputs` has read; each shape of arguments is compiled once."""

    def __init__(self, decode_fn: Any, params: Any, shared: SharedPrompts | None = None):
        """Keeps all; nothing is compiled yet. With `shared`, prompts are read there."""
        self.decode_fn, self.params, self.shared = decode_fn, params, shared
        self._compiled: dict[Any, tuple[Callable, Callable]] = {}

    def compile(self, inputs: tuple[Any, ...]) -> float:
        """Compiles for arguments of this shape, where that is new; returns the seconds it took."""
        begin = time.perf_counter()
        key = _shapes(inputs)
        if key in self._compiled:
            return 0.0
        self._compiled[key] = self.decode_fn.compile(self.params, *inputs)
        return time.perf_counter() - begin

    def warm_up(self, inputs: tuple[Any, Any]) -> None:
        """Compiles, and takes two steps where that was new, so that no first run is timed."""
        import jax

        inputs, _ = self._with_cache(inputs)
        if self.compile(inputs):
            start, advance = self._compiled[_shapes(inputs)]
            jax.block_until_ready(advance(self.params, start(self.params, *inputs), 2))

    def __call__(self, inputs: tuple[Any, Any], finish: Callable | None = None) -> tuple[Any, Seconds]:
        """Decodes one batch.

        Args:
            inputs: what `decode_fn.inputs` returned.
            finish: (advance, params, state) -> the last state, in place of one call of `advance`.

        Returns:
            (the last state, seconds).
        """
        import jax

        inputs, reading = self._with_cache(inputs)
        compiling = self.compile(inputs)
        start, advance = self._compiled[_shapes(inputs)]
        begin = time.perf_counter()
        state = jax.block_until_ready(start(self.params, *inputs))
        filled = time.perf_counter()
        state = advance(self.params, state) if finish is None else finish(advance, self.params, state)
        jax.block_until_ready(state)
        return state, Seconds(compiling, reading + filled - begin, time.perf_counter() - filled)

    def _with_cache(self, inputs: tuple[Any, Any]) -> tuple[tuple[Any, ...], float]:
        """Returns the arguments of `start`, and the seconds that were spent on prompts before it."""
        if self.shared is None or self.decode_fn.plan.steps().looks_on:  # and so reads prompts itself
            return inputs, 0.0
        cache, seconds = self.shared(self.decode_fn, self.params, inputs[0])
        return (*inputs, cache), seconds


def _shapes(inputs: Any) -> Any:
    import jax

    return jax.tree.structure(inputs), tuple(leaf.shape for leaf in jax.tree.leaves(inputs))
