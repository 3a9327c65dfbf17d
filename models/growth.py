"""Growing a trained decoder: more layers by doubling some (Yi, 2403.04652, section 7.3), a longer context by a larger
base of the rotary positions (section 7.1), experts in place of its MLPs (MoE-X, 2503.07639: upcycling).

All are functions from a config and its parameters to new ones, to be trained on. Doubled layers are layers of their
own, with a copy of the weights. With `identity` the copies begin as nothing: their output projections are zero, so the
grown model computes what the old one did. That is not in the paper, whose copies begin as they are; of those that hurt
least the paper says where they are: where what enters a layer and what leaves it have a cosine near 1.

Axis letters: B batch, T query length, D model width, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.config import DecoderConfig, MoEConfig
from models.decoder import Decoder
from models.errors import InputError
from models.layers import kernel_init
from models.moe import upcycled
from models.scratch import ExpertsConfig

_OUTPUTS = ("o", "down", "experts_down")


@dataclasses.dataclass(frozen=True)
class GrowthConfig:
    """How a model is made larger before it is trained; with nothing set it stays as it is.

    Attributes:
        double: [first, one past the last] of the layers that stand twice, the second time behind the first: [12, 28]
            of 32 layers gives 0..27, 12..31, the paper's 9B model.
        identity: whether the copies begin as nothing.
        rope_theta: the new base of the rotary positions, of every layer that has them; Yi: 5e6, and 1e7 for 200K.
        max_length: tokens; the new longest context.
        experts: in place of each MLP, made of its neurons (`models.moe.upcycled`).
    """

    double: tuple[int, ...] | None = None
    identity: bool = False
    rope_theta: float | None = None
    max_length: int | None = None
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        if self.double is not None and (len(self.double) != 2 or not 0 <= self.double[0] <= self.double[1]):
            raise InputError(f"double must be two layers, first and one past the last, got {list(self.double)}")
        if self.identity and self.double is None:
            raise InputError("identity is about doubled layers: set double too")
        if self.rope_theta is not None and not self.rope_theta > 1:
            raise InputError(f"rope_theta must be above 1, got {self.rope_theta}")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"max_length must be at least 1, got {self.max_length}")


def grow_config(config: DecoderConfig, growth: GrowthConfig) -> DecoderConfig:
    """Returns the config of the grown model.

    Raises:
        InputError: layers that are not there, no rotary positions to change, learned positions that would have to be
            made up, or a context shorter than before.
    """
    layers = doubled_order(config.num_layers, growth)
    blocks = [config.blocks[index] for index in layers]
    if growth.rope_theta is not None:
        if all(block.attention.rope is None for block in blocks):
            raise InputError(f"a {config.family} model has no rotary positions, so rope_theta does not apply to it")
        blocks = [_with_theta(block, growth.rope_theta) for block in blocks]
    if growth.experts is not None:
        blocks = [_with_experts(block, growth.experts) for block in blocks]
    max_length = config.max_length if growth.max_length is None else growth.max_length
    if max_length < config.max_length:
        raise InputError(f"max_length {max_length} is less than the model's context of {config.max_length} tokens")
    if max_length != config.max_length and config.learned_positions:
        raise InputError(f"a {config.family} model has learned positions: none are known beyond {config.max_length}")
    return dataclasses.replace(config, blocks=tuple(blocks), max_length=max_length)


def _with_theta(block: Any, theta: float) -> Any:
    rope = block.attention.rope
    if rope is None:
        return block
    rope = dataclasses.replace(rope, theta=float(theta))
    return dataclasses.replace(block, attention=dataclasses.replace(block.attention, rope=rope))


def _with_experts(block: Any, experts: ExpertsConfig) -> Any:
    if isinstance(block.mlp, MoEConfig) or block.mlp.bias:
        raise InputError("experts are made of MLPs without biases: this model has others")
    return dataclasses.replace(block, mlp=experts.instead_of(block.mlp))


def doubled_order(num_layers: int, growth: GrowthConfig) -> list[int]:
    """Returns which old layer each new one is made from; raises InputError for layers that are not there."""
    first, stop = growth.double or (0, 0)
    if stop > num_layers:
        raise InputError(f"double [{first}, {stop}] does not fit a model of {num_layers} layers")
    return [*range(stop), *range(first, num_layers)]


def grow_params(params: dict[str, Any], num_layers: int, growth: GrowthConfig) -> dict[str, Any]:
    """Returns the parameters of the grown model; copies are arrays of their own, with the values of the old ones."""
    grown = {name: value for name, value in params.items() if not name.startswith("layers_")}
    first, stop = growth.double or (0, 0)
    for index, source in enumerate(doubled_order(num_layers, growth)):
        block = params[f"layers_{source}"]
        if stop <= index < 2 * stop - first:
            block = jax.tree.map(jnp.copy, block)
            block = without_outputs(block) if growth.identity else block
        grown[f"layers_{index}"] = block
    return grown


def upcycle(params: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Returns parameters with experts in place of the MLPs; those of a learned router are drawn anew.

    Args:
        params: of a decoder with MLPs.
        config: of the same decoder with mixtures.
    """
    made = dict(params)
    for index, block in enumerate(config.blocks):
        layer, (key, router_key) = params[f"layers_{index}"], jax.random.split(jax.random.key(index))
        learned = block.mlp.router == "learned"
        router = kernel_init(router_key, (config.width, block.mlp.num_experts)) if learned else None
        made[f"layers_{index}"] = {**layer, "mlp": upcycled(layer["mlp"], block.mlp, router, key)}
    return made


def without_outputs(block: dict[str, Any]) -> dict[str, Any]:
    """Returns a block that adds nothing to the residual stream: kernels and biases of its two outputs are zero."""

    def silent(name: str, x: Any) -> Any:
        if name in _OUTPUTS:
            return jax.tree.map(jnp.zeros_like, x)
        return {key: silent(key, value) for key, value in x.items()} if name in ("attention", "mlp", "shared") else x

    return {name: silent(name, x) for name, x in block.items()}


def grow(model: Decoder, params: dict[str, Any], growth: GrowthConfig) -> tuple[Decoder, dict[str, Any]]:
    """Returns the grown model and its parameters; see `GrowthConfig`. Where nothing is to change, both are the old."""
    config = grow_config(model.config, growth)
    params = grow_params(params, model.config.num_layers, growth)
    return Decoder(config, remat=model.remat), params if growth.experts is None else upcycle(params, config)


def layer_cosines(model: Decoder, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Returns f32[L]: how alike what enters each layer and what leaves it are, on average over tokens i32[B, T].

    The cosine of the two residual streams at each token, in float32 (Yi, section 7.3).
    """

    @jax.jit
    def cosines(params, tokens):
        depth = model.config.num_layers
        hidden = model.apply({"params": params}, tokens, collect=tuple(range(depth + 1))).hidden
        unit = [_unit(hidden[index].astype(jnp.float32)) for index in range(depth + 1)]
        return jnp.stack([jnp.mean(jnp.sum(a * b, -1)) for a, b in zip(unit, unit[1:], strict=False)])

    return cosines(params, tokens)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def most_alike(cosines: jax.Array, count: int) -> tuple[int, int]:
    """Returns [first, stop) of the `count` consecutive layers with the highest sum of cosines, the first such.

    Args:
        cosines: f32[L], of `layer_cosines`.
        count: 1 to L.

    Raises:
        InputError: another count.
    """
    if not 1 <= count <= len(cosines):
        raise InputError(f"layers to double must be 1 to {len(cosines)}, the layers of the model, got {count}")
    sums = [float(jnp.sum(cosines[first : first + count])) for first in range(len(cosines) - count + 1)]
    first = max(range(len(sums)), key=sums.__getitem__)
    return first, first + count
