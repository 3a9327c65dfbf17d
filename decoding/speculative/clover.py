"""Clover: heads in a row, each told which token the one before it guessed.

Sources: "Clover: Regressive Lightweight Speculative Decoding with Sequential Knowledge" (2405.00263), and "Clover-2"
(2408.00264) with its released code (`version: 2`). f_t is the target's last hidden state under the final norm, r_t the
one before it, e(x) the unembedding's row of token x. With x_{t+1} known, token t + 1 + i is guessed from y_i:

    attention decoder        A(h, e) = h + concat over heads of cos(q, k) v,   q = W_q norm(h), k = W_k e, v = W_v e
    Clover    augmenting     h_0 = Layer(f), a layer like the target's last one, with a cache of its own
              connection     h_i = A(h_{i-1}, e(x_{t+i}))
              heads          y_i = h_i + SiLU(B_i h_i + b_i)
    Clover-2  augmenting     h_1 = norm(Layer(Layer(A_1(r, e(x_{t+1})))))
              connection     h_i = A_2(h_{i-1}, e(x_{t+i}))
              heads          y_1 = norm(F_1 h_1),   y_i = norm(F_2 [h_i; e(x_{t+i})])

Tokens guessed take the place of those that are not known; the h are carried on, not the y. Of the key of one token
alone a softmax would be 1, hence the cosine. Children may enter the tree in order of probability until `mass` is
reached, those with `share` of the likeliest one's at least, as the authors describe the first version's sampling.

Deviations. The paper keeps of each level what its budget leaves and takes the parents of the next level off it; here
the `nodes` guesses of greatest joint probability are the tree (`decoding.speculative.dynamic_tree`), the best that so
many nodes can be. The layers start as the identity, their output projections zero (the papers: as copies of the
target's last layer); norms behind the heads of Clover-2 start at f's size. e is normalised to RMS 1 (Clover), or as it
stands, times a constant that is trained (Clover-2). What stands in the decoder's place in the ablation is not said;
here (`decoder: false`) h_i = h_{i-1} + SiLU(C [norm(h_{i-1}); e] + c). Losses are those of `finetune.draft_heads`.

Axis letters: B batch, T tokens or rows, K offsets, D model width, H heads.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from decoding.method import Method, Steps, WithDraft
from decoding.speculative.draft_head import HeadKind, Reading, normed
from decoding.speculative.dynamic_tree import Level
from decoding.speculative.level_head import (
    LevelHead,
    LevelOptions,
    fresh_blocks,
    last_blocks,
    make_level,
    run_blocks,
)
from models.attention import dense_attend, segment_attend
from models.cache import KVCache
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import PRECISION, as_kernel, select
from models.layers import Norm

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class CloverConfig:
    """The heads: whose paper they are of, how many, and for the first paper's ablation what they do without.

    Attributes:
        version: 1 or 2.
        offsets: K.
        decoder: the attention decoder; without it a layer over both vectors mixes them.
        connection: what tells a head the token before it; without it there is no decoder either.
        block: the augmenting layer.
    """

    type: Literal["clover"] = "clover"
    version: Literal[1, 2] = 1
    offsets: int = 3
    decoder: bool = True
    connection: bool = True
    block: bool = True

    def __post_init__(self) -> None:
        if self.offsets < 1:
            raise InputError(f"offsets must be at least 1, got {self.offsets}")
        if self.version not in (1, 2):
            raise InputError(f"version must be 1 or 2, got {self.version!r}")
        if self.decoder and not self.connection:
            raise InputError("the decoder reads what the connection brings: without connection set decoder to false")
        if self.version == 2 and not (self.decoder and self.connection and self.block):
            raise InputError("decoder, connection and block can be left out of version 1 alone: set version to 1")


@dataclasses.dataclass(frozen=True)
class CloverOptions(LevelOptions):
    """Head and tree; of a dynamic tree also which children may enter it: those until `mass` is reached, with `share` of
    the likeliest one's probability at least.
    """

    head: Any = CloverConfig()
    nodes: int = 4
    tree: Literal["static", "dynamic"] = "dynamic"
    mass: float = dataclasses.field(default=0.8, metadata={"tree": "dynamic"})
    share: float = dataclasses.field(default=0.25, metadata={"tree": "dynamic"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass <= 1 or not 0 <= self.share <= 1:
            raise InputError(f"mass must be above 0 and share from 0, both at most 1; got {self.mass} and {self.share}")

    def keep(self, log_chance: jax.Array) -> jax.Array:
        """Returns bool[B, T, C]: which children, of log-probabilities f32[B, T, C], may enter the tree."""
        chance = jnp.exp(log_chance)
        before = jnp.cumsum(chance, axis=-1) - chance
        return (before <= self.mass) & (chance >= self.share * chance[..., :1])


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, precision=PRECISION)


def _unembedding(model: Decoder, params: Any) -> Any:
    """Returns the kernel [D, V] of the target's unembedding."""
    return params["embedding"]["embedding"] if model.config.tied_embeddings else params["unembedding"]["kernel"]


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _rms(x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)
    return x if scale is None else x * _along(scale, x)


def attention_decoder(values: Any, heads: int, h: jax.Array, e: jax.Array) -> jax.Array:
    """Returns A(h, e), f32[..., D] all three; `values` have norm [D], q, k and v [D, D], and perhaps bias [3, D]."""
    q, k, v = (_product(x, values[name]) for x, name in ((_rms(h, values["norm"]), "q"), (e, "k"), (e, "v")))
    if "bias" in values:
        q, k, v = (x + _along(values["bias"][index], x) for index, x in enumerate((q, k, v)))
    q, k, v = (x.reshape(*x.shape[:-1], heads, -1) for x in (q, k, v))
    sizes = jnp.sum(jnp.square(q), axis=-1, keepdims=True) * jnp.sum(jnp.square(k), axis=-1, keepdims=True)
    cosine = jnp.sum(q * k, axis=-1, keepdims=True) * jax.lax.rsqrt(jnp.maximum(sizes, _EPSILON**2))
    return h + (cosine * v).reshape(h.shape)


class Heads:
    """The heads on a target: pure functions of values, and of the target's parameters where tokens are looked up."""

    def __init__(self, config: CloverConfig, model: Decoder):
        """Takes settings and target."""
        self.config, self.model = config, model
        self.heads = math.gcd(model.config.width, model.config.blocks[-1].attention.num_heads)
        self.count = config.version if config.block else 0

    def embedded(self, params: Any, values: Any, tokens: jax.Array) -> jax.Array:
        """Returns e, f32[B, T, D], of i32[B, T] tokens."""
        found = select(_unembedding(self.model, params), tokens.reshape(-1), axis=1).materialize()
        found = found.T.reshape(*tokens.shape, -1).astype(jnp.float32)
        return _rms(found) if self.config.version == 1 else found * values["scale"][:, None, None]

    def entering(self, params: Any, values: Any, stream: jax.Array, e: jax.Array) -> jax.Array:
        """Returns f32[B, T, D], what enters the layers, of the target's last stream [B, T, D]."""
        if self.config.version == 1:
            return normed(self.model, params, stream)
        return attention_decoder(values["enter"], self.heads, stream.astype(jnp.float32), e)

    def run(self, values: Any, x: jax.Array, positions: jax.Array, cache: Any, attend: Any, ctx: Any = None):
        """Runs the layers on x [B, T, D]; returns (output, cache with T rows written)."""
        if not self.count:
            return x, cache
        own = [values["block"][f"layers_{index}"] for index in range(self.count)]
        return run_blocks(last_blocks(self.model, self.count), own, x, positions, cache, attend, ctx)

    def first(self, values: Any, x: jax.Array, e: jax.Array) -> jax.Array:
        """Returns h_1 of what left the layers."""
        if self.config.version == 1:
            return self.mixed(values, x, e)
        return Norm(self.model.config.norm).apply({"params": values["norm"]}, x)

    def mixed(self, values: Any, h: jax.Array, e: jax.Array) -> jax.Array:
        """Returns the next h, told of a token."""
        if not self.config.connection:
            return h
        if self.config.decoder:
            return attention_decoder(values["decoder"], self.heads, h, e)
        own = values["concat"]
        both = _product(jnp.concatenate([_rms(h, own["norm"]), e], axis=-1), own["kernel"])
        return h + nn.silu(both + _along(own["bias"], both))

    def read(self, values: Any, depth: int, h: jax.Array, e: jax.Array) -> jax.Array:
        """Returns y of the h behind rows at a depth, and of the e of their tokens."""
        own = values["heads"]
        if self.config.version == 1:
            x = _product(h, own["kernel"][depth])
            return h + nn.silu(x + _along(own["bias"][depth], x))
        if depth == 0:
            return _rms(_product(h, own["first"]), own["first_norm"])
        return _rms(_product(jnp.concatenate([h, e], axis=-1), own["rest"]), own["rest_norm"])


def _fresh_decoder(width: int, version: int, key: jax.Array) -> dict[str, jax.Array]:
    near = [jnp.eye(width) + 0.01 * jax.random.normal(part, (width, width)) for part in jax.random.split(key)]
    made = {"norm": jnp.ones((width,)), "q": near[0], "k": near[1], "v": jnp.zeros((width, width))}
    return made if version == 1 else {**made, "bias": jnp.zeros((3, width))}


def _init(config: CloverConfig, model: Decoder, params: Any, key: jax.Array) -> Any:
    width, keys = model.config.width, jax.random.split(key, 4)
    values: dict[str, Any] = {}
    if config.block:
        made = fresh_blocks(model, config.version, keys[0])
        values["block"] = {f"layers_{index}": block for index, block in enumerate(made)}
    if config.decoder:
        values["decoder"] = _fresh_decoder(width, config.version, keys[1])
    elif config.connection:
        concat = {"norm": jnp.ones((width,)), "kernel": jnp.zeros((2 * width, width)), "bias": jnp.zeros((width,))}
        values["concat"] = concat
    if config.version == 1:
        shape = (config.offsets, width)
        return values | {"heads": {"kernel": jnp.zeros((*shape, width)), "bias": jnp.zeros(shape)}}
    final = jax.tree.map(lambda x: x.astype(jnp.float32), params["final_norm"])
    size = jnp.full((width,), 1.0) * jnp.sqrt(jnp.mean(jnp.square(final["scale"])))
    table = as_kernel(_unembedding(model, params)).materialize().astype(jnp.float32)
    rest = jnp.concatenate([jnp.eye(width), jnp.zeros((width, width))])
    heads = {"first": jnp.eye(width), "first_norm": size, "rest": rest, "rest_norm": size}
    return values | {
        "enter": _fresh_decoder(width, config.version, keys[2]),
        "norm": final,
        "scale": jax.lax.rsqrt(jnp.maximum(jnp.mean(jnp.square(table)), _EPSILON))[None],
        "heads": heads,
    }


def _streams(config: CloverConfig, model: Decoder) -> tuple[int, ...]:
    return (model.config.num_layers,)


def _guesses(config: CloverConfig, model: Decoder, params: Any, values: Any, reading: Reading) -> jax.Array:
    heads, count = Heads(config, model), config.offsets
    later = [jnp.pad(reading.tokens, ((0, 0), (0, k)))[:, k:] for k in range(1, count + 1)]
    known = [heads.embedded(params, values, tokens) for tokens in later]
    x = heads.entering(params, values, reading.hidden[model.config.num_layers], known[0])
    x, _ = heads.run(values, x, reading.positions, None, segment_attend, reading.segments)
    h = heads.first(values, x, known[0])
    found = [heads.read(values, 0, h, known[0])]
    for depth in range(1, count):
        h = heads.mixed(values, h, known[depth])
        found.append(heads.read(values, depth, h, known[depth]))
    return jnp.stack(found, axis=2)


CLOVER_HEAD = HeadKind(CloverConfig, _streams, _init, _guesses)


def clover_head(model: Decoder, options: CloverOptions) -> LevelHead:
    """Returns the heads on a target."""
    heads = Heads(options.head, model)

    def follow(params: WithDraft, cache: KVCache, before: jax.Array, tokens: jax.Array, stream: jax.Array):
        e = heads.embedded(params.target, params.draft, tokens)
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])[None, :]
        x = heads.entering(params.target, params.draft, stream, e)
        x, cache = heads.run(params.draft, x, positions, cache, dense_attend)
        return heads.first(params.draft, x, e), cache

    def go_on(params: WithDraft, level: Level, before: jax.Array, cache: KVCache):
        return heads.mixed(params.draft, before, heads.embedded(params.target, params.draft, level.tokens)), cache

    def reads(params: WithDraft, depth: int, states: jax.Array, tokens: jax.Array) -> jax.Array:
        return heads.read(params.draft, depth, states, heads.embedded(params.target, params.draft, tokens))

    own = (model.config.blocks[-1].attention,) * heads.count
    return LevelHead(CLOVER_HEAD, own, follow, go_on, reads, model.config.width, options.keep)


def make_clover(model: Decoder, options: CloverOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the `options.nodes` guesses of greatest joint probability, or a calibrated tree."""
    return make_level(clover_head(model, options), model, options, stop_tokens)


CLOVER = Method("exact", CloverOptions, make_clover, temperature=0.0, head=True)
