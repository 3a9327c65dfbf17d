"""Timing: sides in turn, and a decode function with compiling, prompt and decoding timed apart."""

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


class TimedDecode:
    """Decodes batches whose arguments `decode_fn.inputs` has read; each shape of arguments is compiled once."""

    def __init__(self, decode_fn: Any, params: Any):
        """Keeps both; nothing is compiled yet."""
        self.decode_fn, self.params = decode_fn, params
        self._compiled: dict[Any, tuple[Callable, Callable]] = {}

    def compile(self, inputs: tuple[Any, Any]) -> float:
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

        compiling = self.compile(inputs)
        start, advance = self._compiled[_shapes(inputs)]
        begin = time.perf_counter()
        state = jax.block_until_ready(start(self.params, *inputs))
        filled = time.perf_counter()
        state = advance(self.params, state) if finish is None else finish(advance, self.params, state)
        jax.block_until_ready(state)
        return state, Seconds(compiling, filled - begin, time.perf_counter() - filled)


def _shapes(inputs: Any) -> Any:
    import jax

    return jax.tree.structure(inputs), tuple(leaf.shape for leaf in jax.tree.leaves(inputs))
