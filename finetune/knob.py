"""Where a model decides what to go by, and the direction that decides it.

Source: "Controllable Context Sensitivity and the Knob Behind It" (2411.07404, sections 4 and 5). Items come in pairs
that differ in the instruction alone (take the answer from the context, or ignore the context). `search_layers` finds
the attention layers whose outputs carry the intent with few patched runs; `train_direction` learns the unit vector u
along which one block's residual stream has to be moved to answer as the other intent asks.

Deviations: patches touch each prompt's last token, so that prompts are read once for all runs. What a layer knows of
the answer is read by the model's own head on its residual stream (the released code injects the stream into another
prompt). Answers are told apart by their first token.

Axis letters: N prompts, L layers, D model width, V vocabulary.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from decoding.knob import check_layer, coordinate, moved
from decoding.prefill import pad_prompts, prefill
from finetune.adapters.saved import Base
from models.cache import KVCache
from models.decoder import Decoder
from models.errors import InputError
from models.head_file import read_head, write_head
from models.patching import Patch, patched_attend, recorded_attend

_KIND = "direction"


@struct.dataclass
class LastTokens:
    """What a model makes of the last tokens of N prompts.

    Attributes:
        tokens: i32[N], the tokens themselves.
        cache: what stands before them.
        hidden: f[L, N, D], the residual stream behind each block.
        outputs: for each layer what its attention puts out, [N, 1, H, Dh].
        logits: f32[N, V].
    """

    tokens: jax.Array
    cache: KVCache
    hidden: jax.Array
    outputs: tuple[jax.Array, ...]
    logits: jax.Array


class LayerRange(NamedTuple):
    """Layers found by `search_layers`: start to stop - 1 and `more`; `reached`: they make the source's answer likely.

    `runs` is how many patched runs that took.
    """

    start: int
    stop: int
    more: tuple[int, ...]
    reached: bool
    runs: int


def read_last(model: Decoder, params: Any, prompts: Sequence[Sequence[int]]) -> LastTokens:
    """Reads prompts, lists of token ids of any lengths."""
    padded = pad_prompts(prompts, model.config.vocab_size)
    return _read(model, params, jax.tree.map(jnp.asarray, padded))


@functools.partial(jax.jit, static_argnums=0)
def _read(model: Decoder, params: Any, prompts: Any) -> LastTokens:
    cache = prefill(model, params, prompts, prompts.tokens.shape[1] + 1)
    tokens = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
    layers = tuple(range(1, model.config.num_layers + 1))
    out = model.apply({"params": params}, tokens, cache=cache, attend=recorded_attend, ctx=(), collect=layers)
    hidden = jnp.stack([out.hidden[layer][:, 0] for layer in layers])
    return LastTokens(tokens[:, 0], cache, hidden, out.aux, out.logits[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def patched_chances(
    model: Decoder, params: Any, target: LastTokens, outputs: tuple[jax.Array, ...], chosen: jax.Array, answers: Any
) -> jax.Array:
    """Returns f32[L, N]: the chance of answers i32[N] behind each layer (the last: the model's own word), in a run with
    attention outputs of the layers bool[L] `chosen` taken from another run.
    """
    layers = tuple(range(1, model.config.num_layers + 1))
    ctx = Patch(outputs, chosen)
    inputs = {"cache": target.cache, "attend": patched_attend, "ctx": ctx, "collect": layers}
    out = model.apply({"params": params}, target.tokens[:, None], **inputs)

    def chance(x: jax.Array) -> jax.Array:
        law = jax.nn.softmax(model.apply({"params": params}, x, method="unembed"), axis=-1)
        return jnp.take_along_axis(law, answers[:, None], axis=1)[:, 0]

    return jax.lax.map(chance, jnp.stack([out.hidden[layer][:, 0] for layer in layers]))


def search_layers(
    run: Callable[[np.ndarray], np.ndarray],
    base: float,
    num_layers: int,
    *,
    threshold: float = 0.85,
    margin: float = 0.3,
    drop: float = 0.05,
) -> LayerRange:
    """Finds a short range of layers that carries an answer from a source run into a target run.

    Args:
        run: bool[L], the layers that are patched -> f[L], the mean chance of the source's answer behind each layer.
        base: the mean chance of the target's own answer when nothing is patched.
        num_layers: L.
        threshold: the range makes the source's answer this likely somewhere (times what all layers together reach,
            where that is less than 1).
        margin: layers are added until the last layer's chance is above `base` + margin, or none is left to add.
        drop: a layer behind which the chance falls by more than this is added.
    """
    runs, kept = 0, {}

    def chances(start: int, stop: int, more: tuple[int, ...] = ()) -> np.ndarray:
        nonlocal runs
        key = start, stop, more
        if key not in kept:
            runs += 1
            chosen = (np.arange(num_layers) >= start) & (np.arange(num_layers) < stop)
            chosen[list(more)] = True
            kept[key] = np.asarray(run(chosen))
        return kept[key]

    wanted = threshold * min(1.0, float(chances(0, num_layers).max()))
    stop = _smallest(1, num_layers, lambda u: chances(0, u).max() >= wanted)
    start = stop - _smallest(1, stop, lambda width: chances(stop - width, stop).max() >= wanted)
    more: tuple[int, ...] = ()
    while (found := chances(start, stop, more))[-1] <= base + margin:
        falls = [layer for layer in range(stop, num_layers) if found[layer] < found[layer - 1] - drop]
        left = [layer for layer in falls if layer not in more]
        if not left:
            break
        more = (*more, left[0])
    return LayerRange(start, stop, more, bool(found[-1] > base + margin), runs)


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Returns the smallest number in low..high for which `holds`, which is so for `high` and all behind the first."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


@functools.partial(jax.jit, static_argnums=(0, 1))
def continued(model: Decoder, layer: int, params: Any, h: jax.Array, cache: KVCache) -> jax.Array:
    """Returns f32[N, V]: what follows where the residual stream of the last tokens is h [N, D] behind a block."""

    def through(module: Decoder, x: jax.Array) -> jax.Array:
        x = module.layers(x, cache.length[:, None], cache, start=layer + 1)[0]
        return module.unembed(x[:, 0])

    return model.apply({"params": params}, h[:, None], method=through)


def exchanged(target: jax.Array, source: jax.Array, unit: jax.Array) -> jax.Array:
    """Returns target [N, D] with the coordinate of source along a unit vector f32[D]: (I - u u^T) t + u u^T s."""
    return moved(target, unit, coordinate(source, unit) - coordinate(target, unit))


def train_direction(
    model: Decoder,
    params: Any,
    layer: int,
    last: LastTokens,
    answers: np.ndarray,
    *,
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> tuple[np.ndarray, list[float]]:
    """Learns a direction by exchanging its coordinate inside pairs of prompts; the model is left as it is.

    Args:
        model: the network.
        params: its parameters.
        layer: the block behind which the coordinate is exchanged.
        last: of N prompts; rows 2i and 2i + 1 are a pair.
        answers: i32[N], first token of the answer that each prompt asks for.
        steps: updates of Adam.
        batch_size: prompts of an update.
        learning_rate: Adam's.
        seed: of the first direction and of the order of prompts.

    Returns:
        (f32[D] of length 1, the loss of each update: the cross-entropy of the answer that the partner asks for).

    Raises:
        InputError: no such layer, an odd number of prompts, or none.
    """
    check_layer(model, layer)
    count = len(answers)
    if count % 2 or not count:
        raise InputError(f"prompts must come in pairs, at least one: got {count}")
    partner = np.arange(count) ^ 1
    hidden = last.hidden[layer]
    inputs = last.cache, hidden, hidden[partner], jnp.asarray(np.asarray(answers, np.int32)[partner])
    optimizer = optax.adam(learning_rate)
    raw = jax.random.normal(jax.random.key(seed), (model.config.width,), jnp.float32)
    raw = raw / jnp.linalg.norm(raw)

    @jax.jit
    def update(raw, state, params, rows):
        cache, target, source, wanted = jax.tree.map(lambda x: x[rows], inputs)

        def loss(raw):
            logits = continued(model, layer, params, exchanged(target, source, raw / jnp.linalg.norm(raw)), cache)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[:, None], axis=1).mean()

        value, gradient = jax.value_and_grad(loss)(raw)
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update(gradient, state, raw)
        return optax.apply_updates(raw, change), state, value

    rng, state, losses = np.random.default_rng(seed), optimizer.init(raw), []
    for _ in range(steps):
        rows = rng.choice(count, min(batch_size, count), replace=False)
        raw, state, value = update(raw, state, params, jnp.asarray(rows))
        losses.append(value)
    return np.asarray(raw / jnp.linalg.norm(raw)), [float(value) for value in losses]


class SavedDirection(NamedTuple):
    """A direction as saved: where it acts, f32[D], figures, the model, and the tuned one that it was found in."""

    layer: int
    direction: np.ndarray
    figures: dict[str, float]
    base: Base
    tuned: Base


def save_direction(path: Path, saved: SavedDirection) -> None:
    """Writes a direction; raises InputError where the file cannot be written."""
    facts = {name: getattr(saved, name) for name in ("layer", "figures")}
    facts |= {name: getattr(saved, name)._asdict() for name in ("base", "tuned")}
    values = {"direction": jnp.asarray(saved.direction, jnp.float32)}
    write_head(path, _KIND, values, {name: json.dumps(value) for name, value in facts.items()})


def load_direction(path: Path, model: Base | None) -> SavedDirection:
    """Reads a direction; `model` (None: any) is the one that is to be steered: the base, or the tuned one.

    Raises:
        InputError: no such file, a damaged one, something else, or a direction of another model.
    """
    values, facts = read_head(path, _KIND, "experiments.reproduce", "configs/tables/context_knob.yaml")
    try:
        direction = np.asarray(values["direction"], np.float32)
        base, tuned = (Base(**json.loads(facts[name])) for name in ("base", "tuned"))
        saved = SavedDirection(int(facts["layer"]), direction, json.loads(facts["figures"]), base, tuned)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged, or of another version: {error}") from error
    if model is not None and model.content not in (base.content, tuned.content):
        raise InputError(
            f"the direction in {path} belongs to {base.name!r} (content {base.content[:12]}), not to {model.name!r} "
            f"(content {model.content[:12]}): load that model, or train a direction for this one"
        )
    if not math.isclose(float(np.linalg.norm(direction)), 1.0, rel_tol=1e-3):
        raise InputError(f"{path} is damaged: its direction is not of length 1")
    return saved
