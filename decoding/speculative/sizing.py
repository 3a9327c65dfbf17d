"""How large a tree pays here: what a target pass over n rows costs on this machine, and what n rows are likely to gain.

A step that verifies n rows emits 1 + (accepted rows) tokens in the time of a pass over n rows. `measure` times the
passes once per model and device (`latency_curve` keeps the result), an `Estimate` learns while decoding how often a
candidate of a given rank and chance is accepted, and `best_size` weighs the two: the n of most tokens per second.
One row, plain decoding, is among the sizes.

Source: the objective is that of Sequoia (2402.12374, section 3.3): expected tokens over the measured time of a step.
Deviation: it is maximised at every step, over the candidates of that step, in place of once over a static tree.

Axis letters: B batch, R candidate rows, k ranks.
"""

import dataclasses
import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.speculative.drafter import SIZES
from models.attention import TreeRows, tree_attend
from models.cache import init_cache
from models.decoder import Decoder
from models.errors import InputError
from models.weights.whole import whole_file

_PRIOR = 4.0  # trials that the prior counts for
MARGIN = 1.2  # how many times plain decoding's speed several rows must promise
_SETTLED = 8.0  # accepted tokens that count as expected and accepted before the first step
_MEMORY = 0.99  # of what was expected and accepted, per step: a bad start is forgotten, drafting or not


@dataclasses.dataclass(frozen=True)
class LatencyCurve:
    """Seconds of a target pass over each number of rows; the first is one row, and there is a second.

    Attributes:
        sizes: numbers of rows.
        seconds: of a pass, for each.
        drafting: seconds that a trained head's guesses cost besides, in a step that has any (`with_drafting`).

    Raises:
        InputError: sizes that do not rise from 1, fewer than two, or seconds that are not positive, one per size.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    drafting: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "seconds", tuple(self.seconds))
        if len(self.sizes) < 2 or self.sizes[0] != 1 or list(self.sizes) != sorted(set(self.sizes)):
            raise InputError(f"sizes must rise from 1, at least two of them; got {self.sizes}")
        if len(self.seconds) != len(self.sizes) or not all(s > 0 for s in self.seconds):
            raise InputError(f"seconds must be positive, one per size; got {self.seconds} for sizes {self.sizes}")
        if not self.drafting >= 0:
            raise InputError(f"drafting must be 0 or more seconds, got {self.drafting}")

    def upto(self, width: int) -> "LatencyCurve":
        """Returns the curve of the sizes up to `width`, from 2 up; where that lies inside, it ends with it."""
        if width >= self.sizes[-1]:
            return self
        below = [size for size in self.sizes if size < width]
        last = float(np.interp(width, self.sizes, self.seconds))
        return LatencyCurve((*below, width), (*self.seconds[: len(below)], last), self.drafting)

    def of_steps(self, rows: np.ndarray) -> np.ndarray:
        """Returns f64[N]: seconds of a head's steps over so many rows each; over one row it drafts nothing."""
        return np.interp(rows, self.sizes, self.seconds) + np.where(rows > 1, self.drafting, 0.0)

    def of_batch(self, batch: int) -> np.ndarray:
        """Returns f32[sizes]: seconds for so many rows of each batch row, along the lines between what was measured."""
        rows, known = np.multiply(self.sizes, batch), np.asarray(self.seconds)
        slope = (known[-1] - known[-2]) / (self.sizes[-1] - self.sizes[-2]) if len(known) > 1 else 0.0
        beyond = np.maximum(rows - self.sizes[-1], 0) * max(slope, 0.0)
        return (np.interp(rows, self.sizes, known) + beyond).astype(np.float32)


def check_latency(latency: LatencyCurve | None) -> None:
    """Raises InputError unless an option is a curve, or None."""
    if not isinstance(latency, LatencyCurve | None):
        raise InputError(
            f"latency must be a LatencyCurve (decoding.speculative.sizing.measure), or None for trees of one size; got "
            f"{latency!r:.80}"
        )


def measure(
    model: Decoder, params: Any, sizes: tuple[int, ...] = SIZES, *, context: int = 256, repeats: int = 9
) -> LatencyCurve:
    """Times a pass of the model over each number of rows, behind `context` tokens, batch of one.

    Passes take turns, so that a slow moment of the machine meets all sizes; the fastest of each counts, since whatever
    else the machine does only adds time.
    """
    slots = context + max(sizes)
    cache = init_cache([b.attention for b in model.config.blocks], 1, slots, params["embedding"]["embedding"].dtype)
    cache = cache.replace(length=jnp.full((1,), context, jnp.int32))

    @functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
    def forward(params: Any, cache: Any, size: int) -> Any:
        depth = jnp.arange(size)[None, :]
        rows = TreeRows(jnp.tril(jnp.ones((1, size, size), bool)), depth)
        tokens = jnp.zeros((1, size), jnp.int32)
        output = model.apply({"params": params}, tokens, context + depth, cache, tree_attend, rows)
        return jnp.argmax(output.logits, axis=-1), output.cache

    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(repeats + 1):
        for size in sizes:
            begin = time.perf_counter()
            token, cache = forward(params, cache, size)
            token.block_until_ready()
            if turn:  # the first one compiles
                seconds[size].append(time.perf_counter() - begin)
    return LatencyCurve(tuple(sizes), tuple(min(seconds[size]) for size in sizes))


def with_drafting(
    curve: LatencyCurve, decode_fn: Any, params: Any, *, context: int = 256, repeats: int = 9
) -> LatencyCurve:
    """Returns the curve with what a trained head's steps take beyond the target's pass over their rows.

    Args:
        curve: of the target on this device.
        decode_fn: decodes with the head and a tree of one size, without stop tokens; has room for `repeats` + 2 steps.
        params: what it is called with.
        context: tokens behind which steps are timed.
        repeats: steps, of which the fastest counts; the two before them compile and read the prompt's last token.
    """
    state = decode_fn.start(params, *decode_fn.inputs([[0] * context]))
    seconds = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        state = jax.block_until_ready(decode_fn.advance(params, state, 1))
        seconds.append(time.perf_counter() - begin)
    rows = decode_fn.plan.steps().rows
    return dataclasses.replace(curve, drafting=max(0.0, min(seconds[2:]) - float(curve.of_batch(rows)[0])))


def latency_curve(
    model: Decoder, params: Any, folder: Path, sizes: tuple[int, ...] = SIZES, *, context: int = 256
) -> LatencyCurve:
    """Returns the curve of a model on this device: measured the first time, then read from `folder`.

    Passes read the whole cache, so that `context` should be about the cache's size in use.
    """
    dtype = params["embedding"]["embedding"].dtype
    device = jax.devices()[0]
    key = repr((model.config, str(dtype), device.platform, device.device_kind, jax.__version__, sizes, context))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return LatencyCurve(tuple(kept["sizes"]), tuple(kept["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        curve = measure(model, params, sizes, context=context)
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(curve)), encoding="utf-8")
    except OSError:
        pass  # measured again next time
    return curve


@struct.dataclass
class Estimate:
    """How often candidates were accepted, by what is known of them: each kind of candidate has a place in two counts.

    Attributes:
        hits: f32[X, Y], how often a candidate of each kind was the right token.
        trials: f32[X, Y], of how many times.
        pending: f32[], what the step under way is expected to accept.
        expected: f32[], what the steps before were expected to accept, the last ones most.
        accepted: f32[], what they accepted, in the same measure.
    """

    hits: jax.Array
    trials: jax.Array
    pending: jax.Array
    expected: jax.Array
    accepted: jax.Array

    def chance(self, place: tuple[jax.Array, jax.Array], prior: jax.Array) -> jax.Array:
        """Returns the chance of candidates at their places to be right; `prior` is that before any trial."""
        return (self.hits[place] + _PRIOR * prior) / (self.trials[place] + _PRIOR)

    def counted(self, place: tuple[jax.Array, jax.Array], tried: jax.Array, hit: jax.Array) -> "Estimate":
        """Returns the estimate with candidates counted at their places: those `tried`, and of them those that hit."""
        tried = tried.astype(jnp.float32)
        hits = self.hits.at[place].add(tried * hit.astype(jnp.float32))
        return self.replace(hits=hits, trials=self.trials.at[place].add(tried))

    def settled(self, accepted: jax.Array) -> "Estimate":
        """Returns the estimate after a step that accepted i32[] drafted tokens."""
        return self.replace(
            pending=jnp.zeros_like(self.pending),
            expected=_MEMORY * self.expected + self.pending,
            accepted=_MEMORY * self.accepted + accepted.astype(jnp.float32),
        )

    def honest(self) -> jax.Array:
        """f32[], at most 1: what was accepted of what was expected. Rows are chosen for a high chance, and the highest
        ones are often too high.
        """
        return jnp.minimum((self.accepted + _SETTLED) / (self.expected + _SETTLED), 1.0)


def no_estimate(shape: tuple[int, int]) -> Estimate:
    """Returns the estimate before any trial."""
    none = np.zeros((), np.float32)
    return Estimate(np.zeros(shape, np.float32), np.zeros(shape, np.float32), none, none, none)


def best_size(curve: LatencyCurve, gains: jax.Array, active: jax.Array) -> jax.Array:
    """Returns the index, i32[], of the size that emits most tokens per second.

    One row is left only for a clear gain: a curve has the target's pass alone, chances are estimates, and the highest
    of several estimates tends to be too high.

    Args:
        curve: what the sizes cost.
        gains: f32[B, R], the chance of each candidate to be accepted; no candidate's exceeds its parent's.
        active: bool[B], batch rows that are not done.
    """
    best = jnp.cumsum(-jnp.sort(-gains, axis=1), axis=1)
    tokens = 1.0 + jnp.pad(best, ((0, 0), (1, 0)))
    rows = np.minimum(curve.sizes, tokens.shape[1]) - 1
    tokens = jnp.where(active[:, None], tokens, 0.0).sum(axis=0)[rows]
    speed = tokens / curve.of_batch(len(gains))
    return jnp.argmax(speed.at[0].multiply(MARGIN)).astype(jnp.int32)
