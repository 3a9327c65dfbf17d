"""EAGLE: one trained layer that goes on with the target's own features, a token at a time.

Source: "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty" (2401.15077), section 3. f_t is the
target's last hidden state under the final norm. Row t of the draft reads e(x_{t+1}) and f_t; its output stands for
f_{t+1}, and the target's unembedding makes guesses of x_{t+2} of it. A guessed token's row reads its embedding and the
output of the row before it in place of the feature:

    z = F [s e; f] + b,    output = block(z), a block like the target's last one, with a cache of its own

After a pass the cache is rebuilt from true features: rows of guesses never stay.

Deviations: the tree is static and comes from calibration, as that of every head here. The block keeps its first norm,
and starts as the identity: its output projections are zero, F is [0.3 I; I]. The loss is that of `finetune.draft_heads`
over `offsets` steps, each fed with the outputs of the one before it (the paper: one step on true features, with noise);
tokens of the text are fed whatever was guessed.

Axis letters: B batch, T tokens of a row, A tokens kept at most, K offsets, W tree rows, R ranks, D model width.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.method import Call, Method, Steps, WithDraft
from decoding.prefill import CHUNK, Prompts, hidden_observer
from decoding.sampling import top_tokens
from decoding.speculative.draft_head import HeadKind, HeadOptions, Reading, check_values, normed, scores
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.groups import Groups, group_attend
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import Template
from models.attention import TreeRows, dense_attend, segment_attend, tree_attend
from models.cache import KVCache, commit, init_cache
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
class EagleOptions(HeadOptions):
    """Head and tree."""

    head: Any = EagleConfig()


@struct.dataclass
class EagleState:
    """The layer's cache, a row for every token but the newest, and [B, D], what its last row came to."""

    cache: KVCache
    last: jax.Array


class Layer:
    """The draft layer on a target: pure functions of (params, values)."""

    def __init__(self, model: Decoder):
        """Takes the target."""
        self.model = model
        self.block = Decoder(dataclasses.replace(model.config, blocks=model.config.blocks[-1:]))

    def enter(self, params: Any, values: Any, tokens: jax.Array, features: jax.Array) -> jax.Array:
        """Returns f32[B, T, D], what enters the block, of i32[B, T] tokens and the features [B, T, D] before them."""
        embedded = jnp.take(params["embedding"]["embedding"], tokens, axis=1, mode="clip")
        embedded = jnp.moveaxis(embedded, 0, -1).astype(jnp.float32) * values["scale"][:, None, None]
        both = jnp.concatenate([embedded, features.astype(jnp.float32)], axis=-1)
        return jnp.matmul(both, values["mix"], precision=PRECISION) + values["bias"][None, None]

    def run(self, values: Any, x: jax.Array, positions: jax.Array, cache: Any, attend: Any, ctx: Any = None):
        """Runs the block on x [B, T, D]; returns (output, cache with T rows written)."""

        def forward(module: Decoder, x: jax.Array):
            out, _, written, _ = module.layers(x, positions, cache, attend, ctx)
            return out, written

        return self.block.apply({"params": {"layers_0": values["block"]}}, x, method=forward)

    def follow(self, params: Any, values: Any, cache: KVCache, tokens: jax.Array, features: jax.Array):
        """Reads tokens i32[B, T] behind a cache, each with the feature of the token before it: (output, cache)."""
        x = self.enter(params, values, tokens, features)
        positions = cache.length[:, None] + jnp.arange(x.shape[1])[None, :]
        return self.run(values, x, positions, cache, dense_attend)


def _streams(config: EagleConfig, model: Decoder) -> tuple[int, ...]:
    return (model.config.num_layers,)


def _init(config: EagleConfig, model: Decoder, params: Any, key: jax.Array) -> Any:
    width = model.config.width
    keys = jax.random.split(key)
    block = Layer(model).block
    fresh = block.init(keys[0], jnp.zeros((1, 1), jnp.int32))["params"]["layers_0"]
    fresh = jax.tree.map(lambda x: x.astype(jnp.float32), fresh)
    for part, name in (("attention", "o"), ("mlp", "down")):
        fresh[part][name] = jax.tree.map(jnp.zeros_like, fresh[part][name])
    eye = jnp.eye(width, dtype=jnp.float32)
    size = jnp.sqrt(jnp.mean(jnp.square(params["embedding"]["embedding"].astype(jnp.float32))))
    return {
        "block": fresh,
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


def read_prompts(layer: Layer, params: WithDraft, prompts: Prompts, slots: int) -> EagleState:
    """Returns the state behind prompts.

    Args:
        layer: the draft layer.
        params: the target's and the layer's.
        prompts: what the text follows, and what a `hidden_observer` has seen of it.
        slots: of the layer's cache.
    """
    batch, width = prompts.tokens.shape
    piece, model = min(width, CHUNK), layer.model
    states = prompts.seen[0].astype(params.target["embedding"]["embedding"].dtype)
    following = jnp.pad(prompts.tokens, ((0, 0), (0, 1)))[:, 1:]

    def read(index: jax.Array, carry: tuple[KVCache, jax.Array]):
        cache, last = carry
        x, tokens = (jax.lax.dynamic_slice_in_dim(x, index * piece, piece, axis=1) for x in (states, following))
        out, cache = layer.follow(params.target, params.draft, cache, tokens, normed(model, params.target, x))
        place = prompts.lengths - 2 - index * piece
        chosen = jnp.take_along_axis(out, jnp.clip(place, 0, piece - 1)[:, None, None], axis=1)[:, 0]
        last = jnp.where(((place >= 0) & (place < piece))[:, None], chosen, last)
        return commit(cache, None, jnp.full((batch,), piece)), last

    own = init_cache([model.config.blocks[-1].attention], batch, max(slots, width), jnp.float32)
    start = own, jnp.zeros((batch, model.config.width), jnp.float32)
    cache, last = jax.lax.fori_loop(0, width // piece, read, start)
    return EagleState(cache.replace(length=prompts.lengths - 1), last)


def drafted(
    layer: Layer, template: Template, ranks: int, params: WithDraft, state: EagleState, round_: Round
) -> jax.Array:
    """Returns the tree's tokens, i32[B, W], level by level: only rows with children are read."""
    tokens = jnp.zeros((len(round_.last), template.width), jnp.int32).at[:, 0].set(round_.last)
    inner = np.unique(template.parent[1:])  # breadth first, row 0 the first of them
    outputs, cache = state.last[:, None], state.cache
    for depth, (start, stop) in enumerate(template.levels):
        level = inner[template.depth[inner] == depth]
        best = top_tokens(scores(layer.model, params.target, outputs), ranks)
        own = np.searchsorted(level, template.parent[start:stop])
        tokens = tokens.at[:, start:stop].set(best[:, own, template.rank[start:stop]])
        below = inner[template.depth[inner] == depth + 1]
        if not len(below):
            break
        upto = inner[(template.depth[inner] <= depth + 1) & (inner > 0)]
        before = outputs[:, np.searchsorted(level, template.parent[below])]
        x = layer.enter(params.target, params.draft, tokens[:, below], before)
        ancestors, steps = template.ancestors[np.ix_(below, upto)], template.depth[upto] - 1
        rows = TreeRows(jnp.asarray(ancestors)[None], jnp.asarray(steps)[None])
        positions = jnp.broadcast_to(cache.length[:, None] + depth, (len(x), len(below)))
        outputs, cache = layer.run(params.draft, x, positions, cache, tree_attend, rows)
    return tokens


def make_eagle(model: Decoder, options: EagleOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the calibrated tree of `options.nodes` guesses."""
    template, layer = options.tree(model.config.vocab_size), Layer(model)
    ranks, most = int(template.rank.max()) + 1, template.max_depth + 1
    inner = len(np.unique(template.parent[1:]))

    def init(params: WithDraft, prompts: Prompts, slots: int, call: Call) -> EagleState:
        check_values(EAGLE_HEAD, options.head, model, params)
        return read_prompts(layer, params, prompts, slots + inner + most)

    def propose(params: WithDraft, state: EagleState, round_: Round):
        tokens = drafted(layer, template, ranks, params, state, round_)
        count = jnp.full_like(round_.last, template.width - 1)
        return template.tree(tokens), state, count, jnp.full_like(count, template.max_depth)

    def observe(params: WithDraft, state: EagleState, seen: Seen) -> EagleState:
        stream = seen.digest[model.config.num_layers]
        f = normed(model, params.target, jnp.take_along_axis(stream, seen.verified.rows[..., None], axis=1))
        out, cache = layer.follow(params.target, params.draft, state.cache, seen.verified.tokens, f)
        last = jnp.take_along_axis(out, seen.verified.count[:, None, None] - 1, axis=1)[:, 0]
        return EagleState(commit(cache, None, seen.emitted), last)

    drafter = Drafter(
        template.width,
        most,
        options.mode,
        init,
        propose,
        observe,
        digest=lambda logits, hidden: hidden,
        collect=(model.config.num_layers,),
        observer=hidden_observer(model.config.width),
    )
    return make_speculative(model, drafter, stop_tokens)


EAGLE = Method("exact", EagleOptions, make_eagle, temperature=0.0, head=True)
