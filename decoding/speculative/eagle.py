"""EAGLE: one trained layer that goes on with the target's own features, a token at a time.

Source: "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty" (2401.15077), section 3. f_t is the
target's last hidden state under the final norm. Row t of the draft reads e(x_{t+1}) and f_t; its output stands for
f_{t+1}, and the target's unembedding makes guesses of x_{t+2} of it. A guessed token's row reads its embedding and the
output of the row before it in place of the feature:

    z = F [s e; f] + b,    output = block(z), a block like the target's last one, with a cache of its own

After a pass the cache is rebuilt from true features: rows of guesses never stay.

With `tree: dynamic` it is EAGLE-2 (2406.16858, `decoding.speculative.dynamic_tree`), from the same weights.

Deviations: the static tree comes from calibration, as that of every head here. The block keeps its first norm, and
starts as the identity: its output projections are zero, F is [0.3 I; I]. The loss is that of `finetune.draft_heads`
over `offsets` steps, each fed with the outputs of the one before it (the paper: one step on true features, with noise);
tokens of the text are fed whatever was guessed.

Axis letters: B batch, T tokens of a row, K offsets, D model width.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from decoding.method import Method, Steps, WithDraft
from decoding.speculative.draft_head import HeadKind, Reading, normed
from decoding.speculative.dynamic_tree import Level
from decoding.speculative.groups import Groups, group_attend
from decoding.speculative.level_head import (
    LevelHead,
    LevelOptions,
    fresh_blocks,
    last_blocks,
    make_level,
    run_blocks,
)
from models.attention import TreeRows, dense_attend, segment_attend, tree_attend
from models.cache import KVCache
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import PRECISION


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """How many steps the layer is trained to take, which is how deep its trees may be."""

    type: Literal["eagle"] = "eagle"
    offsets: int = 4

    def __post_init__(self) -> None:
        if self.offsets < 1:
            raise InputError(f"offsets must be at least 1, got {self.offsets}")


@dataclasses.dataclass(frozen=True)
class EagleOptions(LevelOptions):
    """Head and tree."""

    head: Any = EagleConfig()


class Layer:
    """The draft layer on a target: pure functions of (params, values)."""

    def __init__(self, model: Decoder):
        """Takes the target."""
        self.model = model
        self.block = last_blocks(model)

    def enter(self, params: Any, values: Any, tokens: jax.Array, features: jax.Array) -> jax.Array:
        """Returns f32[B, T, D], what enters the block, of i32[B, T] tokens and the features [B, T, D] before them."""
        embedded = jnp.take(params["embedding"]["embedding"], tokens, axis=1, mode="clip")
        embedded = jnp.moveaxis(embedded, 0, -1).astype(jnp.float32) * values["scale"][:, None, None]
        both = jnp.concatenate([embedded, features.astype(jnp.float32)], axis=-1)
        return jnp.matmul(both, values["mix"], precision=PRECISION) + values["bias"][None, None]

    def run(self, values: Any, x: jax.Array, positions: jax.Array, cache: Any, attend: Any, ctx: Any = None):
        """Runs the block on x [B, T, D]; returns (output, cache with T rows written)."""
        return run_blocks(self.block, [values["block"]], x, positions, cache, attend, ctx)

    def follow(self, params: WithDraft, cache: KVCache, before: jax.Array, tokens: jax.Array, stream: jax.Array):
        """Reads text; see `LevelHead`."""
        x = self.enter(params.target, params.draft, tokens, normed(self.model, params.target, stream))
        positions = cache.length[:, None] + jnp.arange(x.shape[1])[None, :]
        return self.run(params.draft, x, positions, cache, dense_attend)

    def go_on(self, params: WithDraft, level: Level, before: jax.Array, cache: KVCache):
        """Reads a level of guesses, each with what the row before it came to in place of a feature."""
        x = self.enter(params.target, params.draft, level.tokens, before)
        positions = jnp.broadcast_to(cache.length[:, None] + (level.depth - 1), level.tokens.shape)
        rows = TreeRows(level.ancestors, level.steps)
        return self.run(params.draft, x, positions, cache, tree_attend, rows)


def _streams(config: EagleConfig, model: Decoder) -> tuple[int, ...]:
    return (model.config.num_layers,)


def _init(config: EagleConfig, model: Decoder, params: Any, key: jax.Array) -> Any:
    width = model.config.width
    keys = jax.random.split(key)
    eye = jnp.eye(width, dtype=jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(params["embedding"]["embedding"].astype(jnp.float32))))
    return {
        "block": fresh_blocks(model, 1, keys[0])[0],
        "mix": jnp.concatenate([0.3 * eye, eye]) + 0.01 * jax.random.normal(keys[1], (2 * width, width)),
        "bias": jnp.zeros((width,), jnp.float32),
        "scale": (2.0 / jnp.maximum(size, 1e-6))[None],
    }


def _guesses(config: EagleConfig, model: Decoder, params: Any, values: Any, reading: Reading) -> jax.Array:
    layer, (batch, length) = Layer(model), reading.tokens.shape
    f = normed(model, params, reading.hidden[model.config.num_layers])
    later = [jnp.pad(reading.tokens, ((0, 0), (0, k)))[:, k:] for k in range(1, config.offsets + 1)]
    text = layer.enter(params, values, later[0], f)
    found, rows = [], []
    for offset in range(config.offsets):
        if offset:
            rows.append(layer.enter(params, values, later[offset], found[-1]))
        group = jnp.stack(rows, axis=2) if rows else jnp.zeros((batch, length, 0, f.shape[-1]), f.dtype)
        steps = jnp.arange(1, offset + 1)[None, None, :]
        positions = (reading.positions[..., None] + steps).reshape(batch, -1)
        positions = jnp.concatenate([reading.positions, positions], axis=1)
        x = jnp.concatenate([text, group.reshape(batch, -1, f.shape[-1])], axis=1)
        groups = Groups(reading.positions, reading.segments, np.tri(offset, dtype=bool))
        out = layer.run(values, x, positions, None, group_attend if offset else _text_attend, groups)[0]
        found.append(out[:, :length] if not offset else out[:, length:].reshape(group.shape)[:, :, -1])
    return jnp.stack(found, axis=2)


def _text_attend(q, k, v, cache, ctx: Groups, *, config, layer):
    """`group_attend` without groups."""
    out, cache, _ = segment_attend(q, k, v, cache, ctx.segments, config=config, layer=layer)
    return out, cache, ctx


EAGLE_HEAD = HeadKind(EagleConfig, _streams, _init, _guesses)


def eagle_head(model: Decoder) -> LevelHead:
    """Returns the head on a target: what its layer makes of a row is what the unembedding reads."""
    layer = Layer(model)
    own, width = (model.config.blocks[-1].attention,), model.config.width
    return LevelHead(EAGLE_HEAD, own, layer.follow, layer.go_on, lambda params, depth, states, tokens: states, width)


def make_eagle(model: Decoder, options: EagleOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the calibrated tree of `options.nodes` guesses, or EAGLE-2's."""
    return make_level(eagle_head(model), model, options, stop_tokens)


EAGLE = Method("exact", EagleOptions, make_eagle, temperature=0.0, head=True)
