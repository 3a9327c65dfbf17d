"""A knob on what a model goes by: one coordinate of its residual stream is set to a value of the user's. Lossy.

Source: "Controllable Context Sensitivity and the Knob Behind It" (2411.07404, section 5). A unit vector u in the
residual stream behind one block encodes whether an answer is taken from the context or from what the model knows. At
every step the newest token's h there becomes (I - u u^T) h + c u: h moves along u alone, to the coordinate c
(`strength`, one number for all rows or one per row). The prompt before its last token is read as it is.

`strength` nan, the default, turns nothing: the tokens are those of greedy decoding (or, with a temperature, of
sampling). Directions come from `finetune.knob`; (u, c) and (-u, -c) are the same knob.

Axis letters: B batch, D model width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.arguments import Setting
from decoding.autoregressive import SampleCarry, choose, sampling_steps
from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.state import DecodeState, emit
from models.cache import KVCache, commit
from models.decoder import Decoder, next_positions
from models.errors import InputError
from models.kernels import PRECISION

SETTINGS = {
    "strength": Setting(math.nan, np.float32, "finite, or nan for none", lambda x: np.isfinite(x) | np.isnan(x))
}


@dataclasses.dataclass(frozen=True)
class KnobOptions:
    """Where the knob sits.

    Attributes:
        layer: the block behind which h is changed, from 0.
        direction: D numbers, of any length above 0; the mains also take the file of a trained one, which says the
            layer.
    """

    layer: int = 0
    direction: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        try:
            direction = tuple(float(value) for value in self.direction)
        except (TypeError, ValueError) as error:
            raise InputError(f"direction must be a list of numbers, got {self.direction!r:.80}") from error
        if not all(map(math.isfinite, direction)) or (direction and not any(direction)):
            raise InputError("direction must be finite, and not all zero")
        object.__setattr__(self, "direction", direction)


@struct.dataclass
class KnobCarry:
    """What plain sampling keeps, and f32[B], what the knob is set to."""

    sample: SampleCarry
    strength: jax.Array


def coordinate(h: jax.Array, direction: jax.Array) -> jax.Array:
    """Returns f32[...]: where h [..., D] stands along a unit vector f32[D]."""
    return jnp.einsum("...d,d->...", h.astype(jnp.float32), direction, precision=PRECISION)


def moved(h: jax.Array, direction: jax.Array, by: jax.Array) -> jax.Array:
    """Returns h [..., D] moved along a unit vector f32[D] by f32[...]."""
    return h + (by[..., None] * direction.reshape((1,) * by.ndim + (-1,))).astype(h.dtype)


def steered(h: jax.Array, direction: jax.Array, strength: jax.Array) -> jax.Array:
    """Returns h [..., D] with coordinate `strength` f32[...] along a unit vector; as it is where that is nan."""
    by = jnp.where(jnp.isnan(strength), 0.0, strength - coordinate(h, direction))
    return jnp.where(jnp.isnan(strength)[..., None], h, moved(h, direction, by))


def edited_step(
    model: Decoder, params: Any, tokens: jax.Array, cache: KVCache, layer: int, edit: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, KVCache]:
    """Reads one token per row, i32[B], with `edit` between block `layer` and the next.

    Returns:
        f32[B, V] logits, and the cache with the token written behind its length, which stays.
    """

    def through(module: Decoder, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        positions = next_positions(tokens, cache)
        x, _, kept, _ = module.layers(module.embed(tokens, positions), positions, cache, stop=layer + 1)
        x, _, kept, _ = module.layers(edit(x), positions, kept, start=layer + 1)
        return module.unembed(x[:, 0]), kept

    return model.apply({"params": params}, tokens[:, None], method=through)


def check_layer(model: Decoder, layer: int) -> None:
    """Raises InputError where a model has no such block."""
    if not 0 <= layer < model.config.num_layers:
        raise InputError(f"layer must be 0 to {model.config.num_layers - 1}, the blocks of this model; got {layer}")


def make_knob(model: Decoder, options: KnobOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Sampling (greedy by default) behind the knob; raises InputError where it does not fit the model."""
    if len(options.direction) != model.config.width:
        raise InputError(
            f"direction must be {model.config.width} numbers, the width of this model, got {len(options.direction)}: "
            "name the file of one that was trained for it (python -m experiments.reproduce "
            "configs/tables/context_knob.yaml trains one)"
        )
    check_layer(model, options.layer)
    plain = sampling_steps(model, stop_tokens)
    unit = np.asarray(options.direction, np.float64)
    unit = jnp.asarray(unit / np.linalg.norm(unit), jnp.float32)

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> KnobCarry:
        return KnobCarry(plain.init(params, prompts, cache, call), call.own["strength"])

    def step(params: Any, state: DecodeState) -> DecodeState:
        carry = state.carry
        turn = lambda h: steered(h, unit, carry.strength[:, None])  # noqa: E731
        logits, cache = edited_step(model, params, state.last, state.cache, options.layer, turn)
        token, sample = choose(logits, carry.sample, state.lengths)
        cache = commit(cache, None, (~state.done).astype(jnp.int32))
        state = state.replace(cache=cache, carry=carry.replace(sample=sample))
        return emit(state, token[:, None], jnp.ones_like(token), stop_tokens)

    return Steps(init, step)


KNOB = Method("lossy", KnobOptions, make_knob, temperature=0.0, settings=SETTINGS)
