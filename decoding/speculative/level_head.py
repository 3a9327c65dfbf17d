"""Heads that guess level by level: a row of the tree has a state, made of its parent's state and its own token.

EAGLE (`decoding.speculative.eagle`), Clover (`decoding.speculative.clover`) and Chimera
(`decoding.speculative.chimera`) are such heads. What they share is here: the text is read behind each of its tokens but
the newest with the target's true streams, into a cache of the head's own; rows of guesses are read behind that cache
while the tree is made, and never stay.

Trees are static, from calibration, or grow with every step (`decoding.speculative.dynamic_tree`).

Axis letters: B batch, T tokens or rows, A tokens kept at most, W tree rows, D model width, N width of a
state, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.method import Call, Steps, WithDraft
from decoding.prefill import CHUNK, Prompts, hidden_observer
from decoding.sampling import top_tokens
from decoding.speculative.draft_head import HeadKind, HeadOptions, check_values, scores
from decoding.speculative.drafter import Drafter, Round, Seen, sizes_below
from decoding.speculative.dynamic_tree import Growth, Guess, Level, dynamic_tree
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import Template, TokenTree
from models.cache import KVCache, commit, init_cache
from models.config import AttentionConfig
from models.decoder import Decoder
from models.errors import InputError, unknown_name
from models.growth import without_outputs


@dataclasses.dataclass(frozen=True)
class LevelOptions(HeadOptions):
    """Head and tree.

    Attributes:
        tree: `static`, from the head's calibration; `dynamic`, from what it says of each guess.
        beam: rows of a level of a dynamic tree that get children, and children of each.
    """

    tree: Literal["static", "dynamic"] = "static"
    beam: int = dataclasses.field(default=8, metadata={"tree": "dynamic"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tree not in ("static", "dynamic"):
            raise unknown_name("tree", self.tree, ("static", "dynamic"))
        if self.beam < 1:
            raise InputError(f"beam must be at least 1, got {self.beam}")
        if self.tree == "dynamic" and self.latency is not None:
            raise InputError("latency sizes static trees: leave it out, or set tree to static")
        for field in dataclasses.fields(self):
            idle = self.tree == "static" and field.metadata.get("tree") == "dynamic"
            if idle and getattr(self, field.name) != field.default:
                raise InputError(f"{field.name} shapes dynamic trees alone: leave it out, or set tree to dynamic")


class LevelHead(NamedTuple):
    """A head made for one model: pure functions; `params` are the target's and the head's.

    Attributes:
        kind: of the head.
        layers: the attention of each layer that its cache is for.
        follow: (params, cache, f32[B, N] the state before, i32[B, T] tokens, [B, T, D] the target's last stream at the
            token before each) -> (states f32[B, T, N], the cache with T rows written).
        go_on: (params, level, f32[B, T, N] the states of the rows' parents, cache) -> (states of the rows, cache).
        reads: (params, depth, states f32[B, T, N] of rows at a depth, i32[B, T] their tokens) -> f32[B, T, D], what
            the unembedding reads behind them.
        width: N; before a text the state is zero.
        keep: which children may enter a dynamic tree (`Growth.keep`).
    """

    kind: HeadKind
    layers: tuple[AttentionConfig, ...]
    follow: Callable[[WithDraft, KVCache, jax.Array, jax.Array, jax.Array], tuple[jax.Array, KVCache]]
    go_on: Callable[[WithDraft, Level, jax.Array, KVCache], tuple[jax.Array, KVCache]]
    reads: Callable[[WithDraft, int, jax.Array, jax.Array], jax.Array]
    width: int
    keep: Callable[[jax.Array], jax.Array] | None = None


@struct.dataclass
class LevelState:
    """The head's cache, a row for every token but the newest, and f32[B, N], the state behind the newest."""

    cache: KVCache
    last: jax.Array


def last_blocks(model: Decoder, count: int = 1) -> Decoder:
    """Returns a network of `count` blocks like the target's last one."""
    return Decoder(dataclasses.replace(model.config, blocks=model.config.blocks[-1:] * count))


def fresh_blocks(model: Decoder, count: int, key: jax.Array) -> list[Any]:
    """Returns float32 values of each of `last_blocks`, which pass on what they are given: their output projections are
    zero.
    """
    blocks = last_blocks(model, count)
    made = blocks.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    values = [jax.tree.map(lambda x: x.astype(jnp.float32), made[f"layers_{index}"]) for index in range(count)]
    return [without_outputs(block) for block in values]


def run_blocks(
    blocks: Decoder, values: list[Any], x: jax.Array, positions: jax.Array, cache: Any, attend: Any, ctx: Any = None
) -> tuple[jax.Array, Any]:
    """Runs `last_blocks` on x [B, T, D]; returns (output, cache with T rows written)."""

    def forward(module: Decoder, x: jax.Array):
        out, _, written, _ = module.layers(x, positions, cache, attend, ctx)
        return out, written

    params = {f"layers_{index}": block for index, block in enumerate(values)}
    return blocks.apply({"params": params}, x, method=forward)


def read_prompts(head: LevelHead, model: Decoder, params: WithDraft, prompts: Prompts, slots: int) -> LevelState:
    """Returns the state behind prompts.

    Args:
        head: the head.
        model: the target.
        params: the target's and the head's.
        prompts: what the text follows, and what a `hidden_observer` has seen of it.
        slots: of the head's cache.
    """
    batch, width = prompts.tokens.shape
    piece = min(width, CHUNK)
    states = prompts.seen[0].astype(params.target["embedding"]["embedding"].dtype)
    following = jnp.pad(prompts.tokens, ((0, 0), (0, 1)))[:, 1:]

    def read(index: jax.Array, carry: tuple[KVCache, jax.Array, jax.Array]):
        cache, before, last = carry
        x, tokens = (jax.lax.dynamic_slice_in_dim(x, index * piece, piece, axis=1) for x in (states, following))
        out, cache = head.follow(params, cache, before, tokens, x)
        place = prompts.lengths - 2 - index * piece
        chosen = jnp.take_along_axis(out, jnp.clip(place, 0, piece - 1)[:, None, None], axis=1)[:, 0]
        last = jnp.where(((place >= 0) & (place < piece))[:, None], chosen, last)
        return commit(cache, None, jnp.full((batch,), piece)), out[:, -1], last

    own = init_cache(head.layers, batch, max(slots, width), jnp.float32)
    none = jnp.zeros((batch, head.width), jnp.float32)
    cache, _, last = jax.lax.fori_loop(0, width // piece, read, (own, none, none))
    return LevelState(cache.replace(length=prompts.lengths - 1), last)


def guesser(head: LevelHead, model: Decoder, params: WithDraft, last: jax.Array) -> Guess:
    """Returns what asks the head for logits behind a level; it carries the states of the level before and the cache."""

    def guess(level: Level | None, carry: tuple[jax.Array, KVCache]):
        states, cache = carry
        if level is None:
            depth, tokens = 0, last[:, None]
        else:
            parent = jnp.broadcast_to(level.parent, level.tokens.shape)[..., None]
            states, cache = head.go_on(params, level, jnp.take_along_axis(states, parent, axis=1), cache)
            depth, tokens = level.depth, level.tokens
        return scores(model, params.target, head.reads(params, depth, states, tokens)), (states, cache)

    return guess


def static_tree(template: Template, last: jax.Array, guess: Guess, carry: Any) -> TokenTree:
    """Returns the filled tree, level by level: only rows with children are read."""
    ranks = int(template.rank.max()) + 1
    tokens = jnp.zeros((len(last), template.width), jnp.int32).at[:, 0].set(last)
    inner = np.unique(template.parent[1:])  # breadth first, row 0 the first of them
    level: Level | None = None
    for depth, (start, stop) in enumerate(template.levels):
        logits, carry = guess(level, carry)
        read = inner[template.depth[inner] == depth]
        own = np.searchsorted(read, template.parent[start:stop])
        tokens = tokens.at[:, start:stop].set(top_tokens(logits, ranks)[:, own, template.rank[start:stop]])
        below = inner[template.depth[inner] == depth + 1]
        upto = inner[(template.depth[inner] <= depth + 1) & (inner > 0)]
        level = Level(
            depth + 1,
            tokens[:, below],
            jnp.asarray(np.searchsorted(read, template.parent[below]).astype(np.int32))[None],
            jnp.asarray(template.ancestors[np.ix_(below, upto)])[None],
            jnp.asarray(template.depth[upto] - 1)[None],
        )
    return template.tree(tokens)


def make_level(head: LevelHead, model: Decoder, options: LevelOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Returns the steps of a head that guesses level by level."""
    vocab = model.config.vocab_size
    growth = template = None
    if options.tree == "dynamic":
        growth = Growth(options.nodes, min(options.depth, options.nodes), options.beam, head.keep)  # no path is longer
        width, depth, read = growth.width(vocab), growth.depth, sum(growth.sizes(vocab)) - 1
    else:
        template = options.template(vocab)
        width, depth, read = template.width, template.max_depth, len(np.unique(template.parent[1:]))
    most = depth + 1

    def init(params: WithDraft, prompts: Prompts, slots: int, call: Call) -> LevelState:
        check_values(head.kind, options.head, model, params)
        return read_prompts(head, model, params, prompts, slots + read + most)

    def propose(params: WithDraft, state: LevelState, round_: Round):
        start, guess = (state.last[:, None], state.cache), guesser(head, model, params, round_.last)
        if growth is None:
            tree = static_tree(template, round_.last, guess, start)
        else:
            tree, _ = dynamic_tree(growth, round_.last, guess, start)
        count = jnp.zeros_like(round_.last) + (tree.parent >= 0).sum(axis=1, dtype=jnp.int32)
        return tree, state, count, jnp.full_like(count, depth)

    def observe(params: WithDraft, state: LevelState, seen: Seen) -> LevelState:
        stream = seen.digest[model.config.num_layers]
        stream = jnp.take_along_axis(stream, seen.verified.rows[..., None], axis=1)
        out, cache = head.follow(params, state.cache, state.last, seen.verified.tokens, stream)
        last = jnp.take_along_axis(out, seen.verified.count[:, None, None] - 1, axis=1)[:, 0]
        return LevelState(commit(cache, None, seen.emitted), last)

    drafter = Drafter(
        width,
        most,
        options.mode,
        init,
        propose,
        observe,
        smaller=() if head.keep is None or growth is None else sizes_below(width),
        digest=lambda logits, hidden: hidden,
        collect=(model.config.num_layers,),
        observer=hidden_observer(model.config.width),
    )
    return make_speculative(model, drafter, stop_tokens)
