"""ADED (also Adaptix): a tree search over a table of tri-grams that adapts to the text.

Source: "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (2407.12021); the formulas are those
of the released code. At the start of each step the table learns from the last 16 tokens. A Monte-Carlo tree search
(rule PUCT) then walks from the newest pair of tokens, and the 24 most visited nodes, each with its heaviest successor
behind it, are the tree that the target reads.

The search never goes deeper than three tokens, so all that it may meet is looked up at once: node 0 is the newest
token, and the C successors of node g, heaviest first, are nodes C * g + 1 to C * g + C, the children of "group" g.
Their order is breadth first, and a node that a group lacks has weight 0. A rollout starts from a node only in the
iteration that first visits it, and that is always the first child of its group: what a rollout would earn is therefore
drawn before the search, once per group.

Deviations from the released code, besides those of the table: of new children the heaviest is visited first, where the
code takes the last in hash order. Visits tie in favour of the earlier node. Where the tree is too large the rows of
least use go (first successors that no search visited, then nodes, each from the least visited on); the code counts
shared tokens once per path and drops whole paths, the longest first. If the table knows nothing the tree is the newest
token alone; the code drafts an arbitrary token. Rows that sample are verified by node sampling; the code's own rule
changes the law.

Axis letters: B batch, C successors per pair, G groups: 1 + C + C * C, N nodes below node 0: G * C, S sentences, W rows.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.speculative.drafter import Drafter, Round, Seen, sizes_below
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import TokenTree
from decoding.speculative.trigrams import (
    DEFAULT_SLOTS,
    NUM_SUCCESSORS,
    WINDOW,
    Trigrams,
    check_slots,
    empty_table,
    learn,
    look_up,
)
from models.decoder import Decoder
from models.errors import InputError, unknown_name

DEPTH = 3  # tokens that the search goes down
_C1, _C2 = 32.0, 8.0  # of the rule PUCT
_NO_NODE = -1
_LAST = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class AdedOptions:
    """Slots of the table (a power of two), rows of the tree at most, iterations of the search, nodes that become
    sentences, and how nodes are chosen: by visits (`mcts`) or by the product of their normalised weights (`best_first`,
    which the paper compares with; it has no iterations). S sentences never fill more than 2 * S rows, so that the
    paper's 24 fit its 64 rows and the newest token.
    """

    slots: int = DEFAULT_SLOTS
    width: int = 65
    iterations: int = 150
    sentences: int = 24
    search: Literal["mcts", "best_first"] = "mcts"

    def __post_init__(self) -> None:
        check_slots(self.slots)
        for name, least in (("width", 2), ("iterations", 1), ("sentences", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.search not in ("mcts", "best_first"):
            raise unknown_name("search", self.search, ("mcts", "best_first"))


@struct.dataclass
class AdedState:
    """The table, and i32[B, 16]: the last tokens of each row, -1 before a text begins."""

    table: Trigrams
    window: jax.Array


def grow(table: Trigrams, newest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns all that can follow the newest pairs i32[B, 2]: tokens i32[B, G, C] and weights f32[B, G, C]."""
    tokens, weights = look_up(table, newest[:, None])
    levels, own = [(tokens, weights)], newest[:, 1:]  # `own`: i32[B, X], the tokens before the last level's
    for _ in range(DEPTH - 1):
        pairs = jnp.stack([jnp.broadcast_to(own[..., None], tokens.shape), tokens], axis=-1)
        own = tokens.reshape(len(newest), -1)
        tokens, weights = look_up(table, pairs.reshape(len(newest), -1, 2))
        levels.append((tokens, weights))
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*levels, strict=True))


def rollouts(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns f32[G]: the weights that a rollout from each group's first child gathers, down to the last level.

    Args:
        weights: f32[G, C].
        uniform: f32[C + 2], random numbers in [0, 1); successors are drawn in proportion to their weights.
    """
    groups, children = weights.shape

    def drawn(group: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (which successor, its weight); weight 0 where the group is empty."""
        ends = jnp.cumsum(weights[group], axis=-1)
        chosen = jnp.argmax(ends > (uniform * ends[..., -1])[..., None], axis=-1)
        return chosen, jnp.take_along_axis(weights[group], chosen[..., None], axis=-1)[..., 0]

    first, gain = drawn(jnp.ones((1,), jnp.int32), uniform[:1])
    behind = drawn(children + 1 + first, uniform[1:2])[1]
    upper = drawn(jnp.arange(1, children + 1) * children + 1, uniform[2:])[1]
    return jnp.concatenate([gain + behind, upper, jnp.zeros((groups - children - 1,), jnp.float32)])


def monte_carlo(weights: jax.Array, rolled: jax.Array, iterations: int) -> jax.Array:
    """Returns f32[G, C]: how often each node was visited; node 0 is visited in every iteration.

    An iteration goes down by the rule PUCT until it has made a group's nodes, found no successors, or reached the last
    level, and adds the weights that it passed to every node of its path.

    Args:
        weights: f32[G, C], the priors.
        rolled: f32[G], see `rollouts`.
        iterations: how many.
    """
    groups, children = weights.shape

    def iterate(done: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        visits, rewards = carry
        group, num, path = jnp.int32(0), done.astype(jnp.float32), []
        going, reward = jnp.bool_(True), jnp.float32(1)
        for _ in range(DEPTH):
            prior, visited = weights[group], visits[group]
            bonus = (_C1 + jnp.log((num + _C2 + 1) / _C2)) * jnp.sqrt(num)
            score = rewards[group] / jnp.maximum(visited, 1.0) + bonus * prior / (1 + visited)
            score = jnp.where(visited > 0, score, jnp.inf)
            best = jnp.argmax(jnp.where(prior > 0, score, -jnp.inf)).astype(jnp.int32)
            new = visited[0] == 0
            going &= prior[0] > 0
            reward += jnp.where(going, prior[best] + jnp.where(new, rolled[group], 0.0), 0.0)
            path.append((jnp.where(going, group, groups), best))  # beyond all groups: not a node
            group, num = group * children + 1 + best, visited[best]
            going &= ~new
        where = tuple(jnp.stack(part) for part in zip(*path, strict=True))
        return visits.at[where].add(1.0, mode="drop"), rewards.at[where].add(reward, mode="drop")

    zeros = jnp.zeros_like(weights)
    return jax.lax.fori_loop(0, iterations, iterate, (zeros, zeros))[0]


def likelihoods(weights: jax.Array) -> jax.Array:
    """Returns f32[G, C]: the product of the normalised weights from node 0 to each node of f32[G, C]."""
    total = weights.sum(axis=-1, keepdims=True)
    law = weights / jnp.where(total > 0, total, 1.0)
    levels, above, start = [], jnp.ones((1,), jnp.float32), 0
    for _ in range(DEPTH):
        levels.append(above[:, None] * law[start : start + len(above)])
        start, above = start + len(above), levels[-1].reshape(-1)
    return jnp.concatenate(levels)


def chosen_tree(
    table: Trigrams, newest: jax.Array, tokens: jax.Array, worth: jax.Array, options: AdedOptions
) -> TokenTree:
    """Returns node 0, the nodes that are worth most, and behind each of them its heaviest successor.

    Args:
        table: where the successors of the last level's nodes are looked up.
        newest: i32[B, 2], the newest pair of tokens.
        tokens: i32[B, G, C], the nodes below node 0.
        worth: f32[B, G, C], no more than the parent's own; -inf for nodes that cannot be chosen.
        options: sentences S (node 0 is one of them) and width W.
    """
    batch, _, children = tokens.shape
    tokens = jnp.concatenate([newest[:, 1:], tokens.reshape(batch, -1)], axis=1)
    worth, nodes = jax.lax.top_k(worth.reshape(batch, -1), min(options.sentences, tokens.shape[1]) - 1)
    nodes = jnp.pad(jnp.where(worth > -jnp.inf, nodes + 1, _NO_NODE), ((0, 0), (1, 0)))
    own = jnp.take_along_axis(tokens, jnp.maximum(nodes, 0), axis=1)
    before = jnp.take_along_axis(tokens, jnp.maximum(nodes - 1, 0) // children, axis=1)
    before = jnp.where(nodes == 0, newest[:, :1], before)
    further, weights = (x[..., 0] for x in look_up(table, jnp.stack([before, own], axis=-1)))
    behind = nodes * children + 1
    twice = (behind[:, :, None] == nodes[:, None, :]).any(axis=2)
    behind = jnp.where((nodes >= 0) & (weights > 0) & ~twice, behind, _NO_NODE)

    nodes, tokens = jnp.concatenate([nodes, behind], axis=1), jnp.concatenate([own, further], axis=1)
    live = nodes >= 0
    live &= jnp.cumsum(live, axis=1) <= options.width
    rows, tokens = jax.lax.sort((jnp.where(live, nodes, _LAST), tokens), num_keys=1)
    return _hung(rows[:, : options.width], tokens[:, : options.width], children)


def _hung(nodes: jax.Array, tokens: jax.Array, children: int) -> TokenTree:
    """Returns the tree whose rows are these nodes i32[B, W], in their order, dead rows (`_LAST`) at the end."""
    live = nodes < _LAST

    def same(above: jax.Array) -> jax.Array:
        return (above[:, :, None] == nodes[:, None, :]) & live[:, :, None]

    above = jnp.where(live, nodes, 0)
    ancestors, depth = same(above) | jnp.eye(nodes.shape[1], dtype=bool)[None], jnp.zeros_like(nodes)
    for _ in range(DEPTH + 1):
        above = (above - 1) // children  # -1 above node 0, and from there on
        ancestors |= same(above)
        depth += (above >= 0).astype(jnp.int32)
    parent = jnp.argmax(same((nodes - 1) // children), axis=2).astype(jnp.int32)
    return TokenTree(jnp.where(live, tokens, 0), jnp.where(live & (nodes > 0), parent, -1), depth, ancestors)


def make_aded(model: Decoder, options: AdedOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts with the table; `Call.warm` is the table to start from."""
    children = min(NUM_SUCCESSORS, model.config.vocab_size)
    nodes = children + children**2 + children**3
    width = min(options.width, 2 * min(options.sentences, nodes + 1))  # chosen nodes share their prefixes
    most = min(DEPTH + 2, width)

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> AdedState:
        place = prompts.lengths[:, None] - WINDOW + jnp.arange(WINDOW)[None, :]
        window = jnp.take_along_axis(prompts.tokens, jnp.maximum(place, 0), axis=1)
        return AdedState(call.warm, jnp.where(place >= 0, window, -1))

    def worth(weights: jax.Array, key: jax.Array) -> jax.Array:
        if options.search == "best_first":
            return jnp.where(weights > 0, likelihoods(weights), -jnp.inf)
        rolled = rollouts(weights, jax.random.uniform(key, (children + 2,)))
        visits = monte_carlo(weights, rolled, options.iterations)
        made = visits[:, :1] > 0  # a group's first child is visited when the group is made
        return jnp.where(made & (weights > 0), visits, -jnp.inf)

    def propose(params: Any, state: AdedState, round_: Round) -> tuple[TokenTree, AdedState, jax.Array, jax.Array]:
        table = learn(state.table, state.window, ~round_.done)
        newest = state.window[:, -2:]
        tokens, weights = grow(table, newest)
        tree = chosen_tree(table, newest, tokens, jax.vmap(worth)(weights, round_.keys), options)
        drafted = (tree.parent >= 0).sum(axis=1, dtype=jnp.int32)
        return tree, state.replace(table=table), drafted, jnp.zeros_like(drafted)

    def observe(params: Any, state: AdedState, seen: Seen) -> AdedState:
        text = jnp.concatenate([state.window, seen.verified.tokens], axis=1)
        place = seen.emitted[:, None] + jnp.arange(WINDOW)[None, :]
        return state.replace(window=jnp.take_along_axis(text, place, axis=1))

    def cold() -> Trigrams:
        return empty_table(options.slots, model.config.vocab_size)

    drafter = Drafter(width, most, "node", init, propose, observe, cold, lambda state: state.table, sizes_below(width))
    return make_speculative(model, drafter, stop_tokens)


ADED = Method("exact", AdedOptions, make_aded, temperature=0.0)
