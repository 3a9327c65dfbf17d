"""Chimera: short memory of three tokens, long memory of the target's own states, and heads that read both.

Source: "Chimera: A Lossless Decoding Method for Accelerating LLM Inference by Fusing all Tokens" (2402.15758), and its
released code. f_t is the target's last hidden state under the final norm, e_t the embedding of token t. With x_{t+1}
known, token t + 1 + k is guessed from y_k:

    trigram encoder    g_j = P (v + SiLU(A v + a)),  v = [e_{j-2}; e_{j-1}; e_j]
    full context       u^k = Layer(g_{t+k}), which sees f_0 to f_t and u^1 to u^{k-1}, where tokens are not read yet
    residual heads     y_k = Q_k [f_t; u^k]

Layer is one of the target's own kind. A row stands where its token does; the u of guesses are behind no text, so that
what is kept of a step is f alone.

Deviations. Of the heads' matrices [V, 2 D] the unembedding is a frozen factor, and Q_k [D, 2 D], from [I, I] on, the
trained one: the same function at the start, 1/74 of the numbers on SmolLM2. The layer starts as the identity (released:
at random). Rows see the guesses of their own path alone (the released mask hides those from them, and shows others').
Steps behind the first are trained on true tokens and their own u, with gradients through all (released: on their own
guesses, without). Embeddings come to a size near that of f by a factor that is trained. A text's first token is read by
the target alone. The released loss is the cross-entropy; distillation is a weight in `finetune.draft_heads`.

Axis letters: B batch, T tokens or rows, K offsets, D model width, N = (K + 3) D.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from decoding.method import Method, Steps, WithDraft
from decoding.speculative.draft_head import HeadKind, Reading, normed
from decoding.speculative.dynamic_tree import Level
from decoding.speculative.groups import Groups, chain_attend, group_attend
from decoding.speculative.level_head import (
    LevelHead,
    LevelOptions,
    fresh_blocks,
    last_blocks,
    make_level,
    run_blocks,
)
from models.attention import dense_attend
from models.cache import KVCache
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import PRECISION


@dataclasses.dataclass(frozen=True)
class ChimeraConfig:
    """The module: how many steps it is trained to take, and for an ablation what it does without.

    Attributes:
        offsets: K.
        trigram: whether the two tokens before a row's own are read too.
        context: whether rows see the target's states; without it zeros stand in their place.
        residual: whether heads read f_t beside u.
    """

    type: Literal["chimera"] = "chimera"
    offsets: int = 4
    trigram: bool = True
    context: bool = True
    residual: bool = True

    def __post_init__(self) -> None:
        if self.offsets < 1:
            raise InputError(f"offsets must be at least 1, got {self.offsets}")


@dataclasses.dataclass(frozen=True)
class ChimeraOptions(LevelOptions):
    """Head and tree."""

    head: Any = ChimeraConfig()


class Encoders:
    """The module on a target: pure functions of (params, values)."""

    def __init__(self, config: ChimeraConfig, model: Decoder):
        """Takes the settings and the target."""
        self.config, self.model, self.width = config, model, model.config.width
        self.block = last_blocks(model)

    def embedded(self, params: Any, values: Any, tokens: jax.Array) -> jax.Array:
        """Returns e, f32[B, T, D], of i32[B, T]."""
        table = params["embedding"]["embedding"]
        found = jnp.moveaxis(jnp.take(table, tokens, axis=1, mode="clip"), 0, -1)
        return found.astype(jnp.float32) * values["scale"][:, None, None]

    def trigram(self, values: Any, *e: jax.Array) -> jax.Array:
        """Returns g of three embeddings [B, T, D], the newest last."""
        v = jnp.concatenate(e if self.config.trigram else e[2:], axis=-1)
        inner = jnp.matmul(v, values["inner"]["kernel"], precision=PRECISION) + values["inner"]["bias"][None, None]
        return jnp.matmul(v + jax.nn.silu(inner), values["project"], precision=PRECISION)

    def remembered(self, params: Any, stream: jax.Array) -> jax.Array:
        """Returns f, f32[B, T, D], of the target's last stream."""
        return normed(self.model, params, stream).astype(jnp.float32)

    def shown(self, f: jax.Array) -> jax.Array:
        """Returns what rows see of f."""
        return f if self.config.context else jnp.zeros_like(f)

    def run(self, values: Any, x: jax.Array, positions: jax.Array, cache: Any, attend: Any, ctx: Any = None):
        """Runs the layer on x [B, T, D]; returns (output, cache with T rows written where the attention writes)."""
        return run_blocks(self.block, [values["block"]], x, positions, cache, attend, ctx)

    def behind(
        self, values: Any, chains: list[jax.Array], first: jax.Array, seen: jax.Array, cache: KVCache
    ) -> jax.Array:
        """Returns u of the last row of each of T chains [B, T, D] a row, which stand from the positions i32[B, T]
        `first` on and see i32[B, T] slots of the cache.
        """
        rows = jnp.stack(chains, axis=2)
        batch, tokens, count, width = rows.shape
        positions = (first[..., None] + jnp.arange(count)[None, None, :]).reshape(batch, -1)
        out, _ = self.run(values, rows.reshape(batch, -1, width), positions, cache, chain_attend, seen)
        return out.reshape(rows.shape)[:, :, -1]

    def read(self, values: Any, depth: int, f: jax.Array, u: jax.Array) -> jax.Array:
        """Returns y of the head at an offset from 0 on."""
        both = jnp.concatenate([f, u], axis=-1) if self.config.residual else u
        return jnp.matmul(both, values["heads"][depth], precision=PRECISION)


def _streams(config: ChimeraConfig, model: Decoder) -> tuple[int, ...]:
    return (model.config.num_layers,)


def _init(config: ChimeraConfig, model: Decoder, params: Any, key: jax.Array) -> Any:
    width, keys = model.config.width, jax.random.split(key)
    read = 3 * width if config.trigram else width
    eye = jnp.eye(width, dtype=jnp.float32)
    head = jnp.concatenate([eye, eye]) if config.residual else eye
    size = jnp.sqrt(jnp.mean(jnp.square(params["embedding"]["embedding"].astype(jnp.float32))))
    return {
        "block": fresh_blocks(model, 1, keys[0])[0],
        "inner": {"kernel": jnp.zeros((read, read)), "bias": jnp.zeros((read,))},
        "project": jax.random.normal(keys[1], (read, width)) / np.float32(np.sqrt(read)),
        "heads": [head for _ in range(config.offsets)],
        "scale": (2.0 / jnp.maximum(size, 1e-6))[None],
    }


def _guesses(config: ChimeraConfig, model: Decoder, params: Any, values: Any, reading: Reading) -> jax.Array:
    module, (batch, length) = Encoders(config, model), reading.tokens.shape
    f = module.remembered(params, reading.hidden[model.config.num_layers])
    e = module.embedded(params, values, reading.tokens)
    e = jnp.pad(e, ((0, 0), (1, config.offsets), (0, 0)))  # entry 0 is that of the token before the first
    found, chain = [], []
    for offset in range(config.offsets):
        places = [offset + step for step in (-1, 0, 1)]  # of the trigram, from each token on
        old = [(reading.positions + place >= 1)[..., None] for place in places]  # the first of a text is not read
        near = [jnp.where(own, e[:, 1 + p :][:, :length], 0.0) for own, p in zip(old, places, strict=True)]
        rows = jnp.stack([*chain, module.trigram(values, *near)], axis=2)
        steps = jnp.arange(1, offset + 2)[None, None, :]
        positions = (reading.positions[..., None] + steps).reshape(batch, -1)
        positions = jnp.concatenate([reading.positions, positions], axis=1)
        x = jnp.concatenate([module.shown(f), rows.reshape(batch, -1, module.width)], axis=1)
        groups = Groups(reading.positions, reading.segments, np.tri(offset + 1, dtype=bool))
        out = module.run(values, x, positions, None, group_attend, groups)[0]
        chain.append(out[:, length:].reshape(rows.shape)[:, :, -1])
        found.append(module.read(values, offset, f, chain[-1]))
    return jnp.stack(found, axis=2)


CHIMERA_HEAD = HeadKind(ChimeraConfig, _streams, _init, _guesses)


def chimera_head(model: Decoder, config: ChimeraConfig) -> LevelHead:
    """Returns the module on a target. A row's state is [u^1; ...; u^K; f; e of the token before; e]."""
    module = Encoders(config, model)
    parts, width = config.offsets + 3, model.config.width

    def split(state: jax.Array) -> list[jax.Array]:
        return jnp.split(state, parts, axis=-1)

    def follow(params: WithDraft, cache: KVCache, before: jax.Array, tokens: jax.Array, stream: jax.Array):
        f, count = module.remembered(params.target, stream), tokens.shape[1]
        e = module.embedded(params.target, params.draft, tokens)
        e = jnp.concatenate([jnp.stack(split(before)[-2:], axis=1), e], axis=1)
        near = [e[:, start : start + count] for start in range(3)]
        positions = cache.length[:, None] + jnp.arange(count)[None, :]
        cache = module.run(params.draft, module.shown(f), positions, cache, dense_attend)[1]
        row = module.trigram(params.draft, *near)
        u = module.behind(params.draft, [row], positions + 1, positions + 1, cache)
        none = [jnp.zeros_like(u)] * (config.offsets - 1)
        return jnp.concatenate([u, *none, f, *near[1:]], axis=-1), cache

    def go_on(params: WithDraft, level: Level, before: jax.Array, cache: KVCache):
        old, e = split(before), module.embedded(params.target, params.draft, level.tokens)
        length = jnp.broadcast_to(cache.length[:, None], level.tokens.shape)
        row = module.trigram(params.draft, *old[-2:], e)
        u = module.behind(params.draft, [*old[: level.depth], row], length, length, cache)
        chain = [*old[: level.depth], u, *old[level.depth + 1 : config.offsets]]
        return jnp.concatenate([*chain, old[-3], old[-1], e], axis=-1), cache

    def reads(params: WithDraft, depth: int, states: jax.Array, tokens: jax.Array) -> jax.Array:
        old = split(states)
        return module.read(params.draft, depth, old[-3], old[depth])

    own = (model.config.blocks[-1].attention,)
    return LevelHead(CHIMERA_HEAD, own, follow, go_on, reads, parts * width)


def make_chimera(model: Decoder, options: ChimeraOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the calibrated tree of `options.nodes` guesses, or one that grows with every step."""
    return make_level(chimera_head(model, options.head), model, options, stop_tokens)


CHIMERA = Method("exact", ChimeraOptions, make_chimera, temperature=0.0, head=True)
