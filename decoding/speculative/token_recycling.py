"""Token Recycling: a table of each token's likely successors, filled with what the target computes anyway.

Source: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
(2408.08696). For each token id the table keeps the k most likely next tokens of the last time that the target read that
token; a tree of fixed shape is filled by walking the table from the newest token, and every row of the tree, accepted
or not, refreshes it.

Deviations from the released code: it writes rows of one id in an unspecified order, here the last row of an id wins; it
keeps the table in a global, here it is a value (`output.warm`); it ignores sampling, here rows that sample are verified
by node sampling. One table serves the whole batch. `recycle_prompt` also fills it from the prompt, which the paper does
not do; it reads the prompt once more.

Axis letters: B batch, W tree rows, V vocabulary, k successors kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.sampling import top_tokens
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.loop import make_speculative
from decoding.speculative.sizing import Estimate, LatencyCurve, best_size, check_latency, no_estimate
from decoding.speculative.tree import Template, TokenTree
from models.cache import commit, init_cache
from models.decoder import Decoder
from models.errors import InputError

_PAPER_TREE = """
:8
0:8 1:4 2:3 3:2 4:1 5:1 6:1 7:1
00:8 01:3 02:2 03:1 04:1 05:1 06:1 07:1 10:2 11:1 20:1 30:1 40:1 50:1
000:5 001:2 002:1 003:1 004:1 010:1 020:1 100:1 200:1 300:1
0000:3 0001:1 0002:1 0010:1 0100:1 1000:1
00000:2 00010:1
"""  # a path of ranks, and how many children it has
NUM_SUCCESSORS = 8
_BINS = 8  # of the chances that successors are noted with, where trees are sized
_PIECE = 64  # tokens of each prompt whose logits are held at once


def paper_template() -> Template:
    """Returns the 81 rows of the released code, in levels of 8, 21, 25, 15, 8 and 3 below the newest token."""
    children = [line.split(":") for line in _PAPER_TREE.split()]
    paths = [()] + [(*map(int, path), rank) for path, count in children for rank in range(int(count))]
    return Template(tuple(sorted(paths, key=lambda path: (len(path), path))))


@dataclasses.dataclass(frozen=True)
class TokenRecyclingOptions:
    """Rows of the tree (the likeliest ones of the paper's 81), and whether the prompt fills the table too.

    With `latency` (`decoding.speculative.sizing`) each step takes as many of these rows as pay on this machine.
    """

    width: int = 81
    recycle_prompt: bool = False
    latency: LatencyCurve | None = None

    def __post_init__(self) -> None:
        check_latency(self.latency)
        if not 2 <= self.width <= 81:
            raise InputError(f"width must be 2 to 81 rows of the paper's tree, got {self.width}")


@struct.dataclass
class Memory:
    """What is learned: the table i32[V, k]; for sized trees also f32[V, k], each successor's chance when it was noted,
    and how often successors were accepted.
    """

    table: jax.Array
    chances: jax.Array | None = None
    estimate: Estimate | None = None


def fill(template: Template, table: jax.Array, last: jax.Array) -> jax.Array:
    """Returns the tree's tokens, i32[B, W]: row i is its parent's successor of rank[i]. One gather per level."""
    tokens = jnp.zeros((last.shape[0], template.width), jnp.int32).at[:, 0].set(last)
    for start, stop in template.levels:
        parents = tokens[:, template.parent[start:stop]]
        tokens = tokens.at[:, start:stop].set(table[parents, template.rank[start:stop][None, :]])
    return tokens


def gains(template: Template, memory: Memory, tokens: jax.Array) -> jax.Array:
    """Returns f32[B, W - 1]: the chance that each row of the filled tree, below row 0, is accepted."""
    parent, rank = template.parent[1:], template.rank[1:][None, :]
    step = _acceptance(memory, memory.chances[tokens[:, parent], rank], rank)
    found = jnp.ones((len(tokens), template.width), jnp.float32)
    for start, stop in template.levels:
        found = found.at[:, start:stop].set(found[:, template.parent[start:stop]] * step[:, start - 1 : stop - 1])
    return found[:, 1:]


def _acceptance(memory: Memory, chances: jax.Array, rank: jax.Array) -> jax.Array:
    """Returns the chance that successors noted with `chances` are right; 0 for those that were never noted."""
    return jnp.where(chances > 0, memory.estimate.chance(_kind(rank, chances), chances), 0.0)


def _kind(rank: jax.Array, chances: jax.Array) -> tuple[jax.Array, jax.Array]:
    bins = jnp.clip((chances * _BINS).astype(jnp.int32), 0, _BINS - 1)
    return jnp.broadcast_to(rank, chances.shape), bins


def sized(template: Template, memory: Memory, curve: LatencyCurve, round_: Round) -> tuple[TokenTree, Memory]:
    """Returns the tree of the likeliest rows, as many as pay: its live rows first, `curve.sizes[-1]` rows in all; and
    the memory with what that is expected to gain.
    """
    tokens = fill(template, memory.table, round_.last)
    chances = gains(template, memory, tokens) * memory.estimate.honest()
    size = jnp.asarray(curve.sizes)[best_size(curve, chances, ~round_.done)]
    best = 1 + jax.lax.top_k(chances, curve.sizes[-1] - 1)[1]  # a parent is never below its child: ties go by place
    live = (jnp.arange(best.shape[1])[None, :] < size - 1) & (jnp.take_along_axis(chances, best - 1, axis=1) > 0)
    places = jnp.sort(jnp.where(live, best, template.width), axis=1)
    places = jnp.concatenate([jnp.zeros_like(places[:, :1]), places], axis=1)
    pending = jnp.where(live, jnp.take_along_axis(chances, best - 1, axis=1), 0.0).sum(where=~round_.done[:, None])
    tree = template.tree(tokens).subtree(jnp.minimum(places, template.width - 1), places < template.width)
    return tree, memory.replace(estimate=memory.estimate.replace(pending=pending))


def successors(logits: jax.Array, count: int, with_chances: bool) -> tuple[jax.Array, jax.Array | None]:
    """Returns the `count` likeliest tokens behind logits f32[..., V], and their chances where these are wanted."""
    best = top_tokens(logits, count)
    if not with_chances:
        return best, None
    kept = jnp.take_along_axis(logits, best, axis=-1)
    return best, jnp.exp(kept - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def recycle(memory: Memory, tokens: jax.Array, noted: tuple[jax.Array, jax.Array | None], real: jax.Array) -> Memory:
    """Returns the memory with each row of `tokens` (i32[B, X]) set to its successors [B, X, k], as `successors` gives.

    Where a token occurs more than once its last real row wins; rows that are not `real` (bool[B, X]) write nothing.
    """
    tokens, real = tokens.reshape(-1), real.reshape(-1)
    best, law = jax.tree.map(lambda x: x.reshape(len(tokens), -1), noted)
    rows = jnp.arange(len(tokens))
    last = jnp.full(memory.table.shape[:1], -1).at[tokens].max(jnp.where(real, rows, -1))
    target = jnp.where(last[tokens] == rows, tokens, len(memory.table))
    chances = None if law is None else memory.chances.at[target].set(law, mode="drop")
    return memory.replace(table=memory.table.at[target].set(best, mode="drop"), chances=chances)


def learned(memory: Memory, seen: Seen) -> Estimate:
    """Returns the estimate with what a step's new tokens say: which successors of the token before each would do."""
    tokens = seen.verified.tokens
    before = jnp.concatenate([seen.tree.tokens[:, :1], tokens[:, :-1]], axis=1)
    new = jnp.arange(tokens.shape[1])[None, :] < seen.emitted[:, None]
    hit = memory.table[before] == tokens[..., None]
    chances = memory.chances[before]
    counted = memory.estimate.counted(_kind(jnp.arange(hit.shape[2]), chances), new[..., None] & (chances > 0), hit)
    return counted.settled(jnp.maximum(seen.emitted - 1, 0).sum())


def recycle_prompts(model: Decoder, params: Any, prompts: Prompts, memory: Memory) -> Memory:
    """Returns the memory with the prompts' tokens recycled, a piece of every prompt at a time."""
    batch, width = prompts.tokens.shape
    piece = min(width, _PIECE)
    cache = init_cache(
        [block.attention for block in model.config.blocks], batch, width, params["embedding"]["embedding"].dtype
    )

    def read(index: jax.Array, carry: tuple[Memory, Any]) -> tuple[Memory, Any]:
        memory, cache = carry
        tokens = jax.lax.dynamic_slice_in_dim(prompts.tokens, index * piece, piece, axis=1)
        output = model.apply({"params": params}, tokens, cache=cache)
        real = cache.length[:, None] + jnp.arange(piece)[None, :] < prompts.lengths[:, None]
        noted = successors(output.logits, memory.table.shape[1], memory.chances is not None)
        memory = recycle(memory, tokens, noted, real)
        return memory, commit(output.cache, None, jnp.full((batch,), piece))

    return jax.lax.fori_loop(0, width // piece, read, (memory, cache))[0]


def make_token_recycling(model: Decoder, options: TokenRecyclingOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts with the table; `Call.warm` is the table to start from."""
    kept = min(NUM_SUCCESSORS, model.config.vocab_size)
    paths = [path for path in paper_template().paths if all(rank < kept for rank in path)]
    template = Template(tuple(paths)).prefix(options.width)

    curve = options.latency and options.latency.upto(template.width)
    sizes = curve.sizes if curve else (template.width,)

    def cold() -> Memory:
        shape = model.config.vocab_size, kept
        table = np.zeros(shape, np.int32)
        return Memory(table, np.zeros(shape, np.float32), no_estimate((kept, _BINS))) if curve else Memory(table)

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> Memory:
        return recycle_prompts(model, params, prompts, call.warm) if options.recycle_prompt else call.warm

    def propose(params: Any, memory: Memory, round_: Round) -> tuple[TokenTree, Memory, jax.Array, jax.Array]:
        if curve:
            tree, memory = sized(template, memory, curve, round_)
        else:
            tree = template.tree(fill(template, memory.table, round_.last))
        zero = jnp.zeros_like(round_.last)
        return tree, memory, zero + (tree.parent >= 0).sum(axis=1, dtype=jnp.int32), zero

    def observe(params: Any, memory: Memory, seen: Seen) -> Memory:
        live = seen.tree.parent >= 0
        real = (seen.emitted > 0)[:, None] & live.at[:, 0].set(True)
        if curve:
            estimate = learned(memory, seen)
            memory = memory.replace(estimate=estimate)
            # Always true, but known only once the table was read: so it is written in place, not copied.
            real &= (estimate.hits + estimate.trials).sum() >= 0
        return recycle(memory, seen.tree.tokens, seen.digest, jnp.broadcast_to(real, seen.tree.tokens.shape))

    def digest(logits: jax.Array, hidden: Any) -> tuple[jax.Array, jax.Array | None]:
        return successors(logits, kept, curve is not None)

    most = template.max_depth + 1
    drafter = Drafter(sizes[-1], most, "node", init, propose, observe, cold, lambda memory: memory, sizes[:-1], digest)
    return make_speculative(model, drafter, stop_tokens)


TOKEN_RECYCLING = Method("exact", TokenRecyclingOptions, make_token_recycling, temperature=0.0, grammars=True)
