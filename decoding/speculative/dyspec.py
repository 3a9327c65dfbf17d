"""DySpec: a tree grown where the draft itself expects tokens to be reached and used.

Source: "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure" (2410.11744). Drawing the k-th child of
a row is worth v = (chance of reaching the row) x (chance that its elder siblings fail), where a token's chance of being
accepted is estimated by its probability in what the draft's law has left. The tree holds the `budget` draws of highest
value (algorithm 1). Whether a token is in the tree depends on the value of drawing it, never on which token it is: its
own younger siblings and descendants are worth less. So siblings are a draw without replacement, as the verifier needs.

Deviations: algorithm 1 calls the draft once per row. Here, as in the paper's layer-wise algorithm 2, a level is read in
one pass; `frontier` draws of highest value go on from each level, down to `depth`, and the best `budget` of all of them
are kept. That is algorithm 1 where its tree has no wider level and no deeper row. The chance of acceptance is
estimated by probability ** `exponent` (the paper: 1). Greedy rows draw nothing where `draft_temperature` is None; the
paper always draws at 0.6.

Axis letters: B batch, T rows of a level, C children per row, F frontier, N candidates, W tree rows, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.speculative.draft_model import (
    DraftOptions,
    DraftStream,
    by_rank,
    check_draft,
    draft_law,
    draw_children,
    keep,
    read_newest,
    read_rows,
    start_stream,
)
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.dynamic_tree import best_rows
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import TokenTree, grown
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class DySpecOptions(DraftOptions):
    """Rows of the tree without the newest token, rows and levels that the draft reads for it, children per row at most,
    and how a draft's probability becomes an estimated chance of acceptance: to the power of `exponent`, or by
    `estimate`, f32[...] -> f32[...] (a table that was fitted, say); it should rise, and stay in 0 to 1.
    """

    budget: int = 8
    frontier: int = 4
    depth: int = 5
    children: int = 4
    exponent: float = 1.0
    estimate: Callable[[jax.Array], jax.Array] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budget", "frontier", "depth", "children"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.exponent > 0:
            raise InputError(f"exponent must be above 0, got {self.exponent}")
        if self.estimate is not None and not callable(self.estimate):
            raise InputError(f"estimate must be a function of probabilities, or None; got {self.estimate!r}")

    def chance(self, probability: jax.Array) -> jax.Array:
        """Returns the estimated chance of acceptance of tokens with these probabilities among those left."""
        return probability**self.exponent if self.estimate is None else self.estimate(probability)


@struct.dataclass
class Candidates:
    """A candidate tree, breadth first: tokens, parent and depth i32[B, N], ancestors bool[B, N, N], value f32[B, N] of
    drawing each row (infinite for row 0), reached f32[B, N]: the chance that the row is accepted.
    """

    tokens: jax.Array
    parent: jax.Array
    depth: jax.Array
    ancestors: jax.Array
    value: jax.Array
    reached: jax.Array


@struct.dataclass
class DySpecState:
    """The draft's stream, and i32[B, W]: which candidate each row of the tree was."""

    stream: DraftStream
    places: jax.Array


def draw_values(
    law: jax.Array, tokens: jax.Array, reached: jax.Array, estimate: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the value of each draw, and the chance of reaching what was drawn; f32[B, T, C] both.

    Args:
        law: f32[B, T, V], the draft's law behind each row of a level.
        tokens: i32[B, T, C], children in draw order.
        reached: f32[B, T], the chance of reaching each row.
        estimate: from a draw's probability to its chance of acceptance (`DySpecOptions.chance`).
    """
    drawn = jnp.take_along_axis(law, tokens, axis=-1)
    left = 1.0 - (jnp.cumsum(drawn, axis=-1) - drawn)
    chance = estimate(jnp.clip(drawn / jnp.maximum(left, 1e-20), 0.0, 1.0))
    fails = jnp.cumprod(1.0 - chance, axis=-1)
    value = reached[..., None] * jnp.concatenate([jnp.ones_like(fails[..., :1]), fails[..., :-1]], axis=-1)
    return value, value * chance


def add_level(
    tree: Candidates, law: jax.Array, keys: jax.Array, ranked: jax.Array, options: DySpecOptions
) -> Candidates:
    """Returns the candidates with one level more: the draws of highest value behind the last T rows.

    Args:
        tree: the candidates so far.
        law: f32[B, T, V], the draft's law behind the last T of them.
        keys: one key per batch row.
        ranked: bool[B], batch rows that take the likeliest children in place of a draw.
        options: frontier, children and the estimate.
    """
    batch, num, vocab = law.shape
    children, alive = draw_children(law, min(options.children, vocab), keys, ranked)
    first = tree.tokens.shape[1] - num
    value, reached = draw_values(law, children, tree.reached[:, first:], options.chance)
    value = jnp.where(alive & (tree.value[:, first:, None] > -jnp.inf), value, -jnp.inf).reshape(batch, -1)
    chosen = jax.lax.top_k(value, min(options.frontier, value.shape[1]))[1]
    parent = first + chosen // children.shape[2]

    def with_chosen(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old, jnp.take_along_axis(new.reshape(batch, -1), chosen, axis=1)], axis=1)

    return Candidates(
        with_chosen(tree.tokens, children),
        jnp.concatenate([tree.parent, parent], axis=1),
        jnp.concatenate([tree.depth, jnp.take_along_axis(tree.depth, parent, axis=1) + 1], axis=1),
        grown(tree.ancestors, parent),
        with_chosen(tree.value, value),
        with_chosen(tree.reached, reached),
    )


def pruned(tree: Candidates, laws: jax.Array, width: int) -> tuple[TokenTree, jax.Array]:
    """Returns the tree of the `width` candidates of highest value, and i32[B, W]: which candidates they are.

    `laws` f32[B, X, V] stand behind the first X candidates. No candidate is worth more than its parent or elder
    siblings, which come first and so win ties: what is kept is a tree.
    """
    candidates = TokenTree(tree.tokens, tree.parent, tree.depth, tree.ancestors, laws)
    return best_rows(candidates, tree.value, width)


def make_dyspec(model: Decoder, options: DySpecOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the tree of highest value."""
    draft = check_draft(model, options.draft, "dyspec")
    sizes = [1]  # rows of each level of candidates
    for _ in range(options.depth):
        sizes.append(min(options.frontier, sizes[-1] * min(options.children, model.config.vocab_size)))
    width = 1 + min(options.budget, sum(sizes[1:]))

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> DySpecState:
        places = jnp.zeros((len(prompts.tokens), width), jnp.int32)
        return DySpecState(start_stream(draft, params.draft, prompts, slots + sum(sizes)), places)

    def propose(params: Any, state: DySpecState, round_: Round):
        batch = len(round_.last)
        one = jnp.ones((batch, 1), jnp.float32)
        zero = jnp.zeros((batch, 1), jnp.int32)
        tree = Candidates(round_.last[:, None], zero - 1, zero, jnp.ones((batch, 1, 1), bool), one * jnp.inf, one)
        logits, stream = read_newest(draft, params.draft, state.stream, round_)
        logits, laws, ranked = logits[:, None], [], by_rank(round_, options.draft_temperature)
        for level in range(options.depth):
            laws.append(draft_law(logits, round_, options.draft_temperature))
            keys = jax.vmap(jax.random.fold_in, (0, None))(round_.keys, level)
            tree = add_level(tree, laws[-1], keys, ranked, options)
            if level + 1 < options.depth:
                new = sizes[level + 1]
                rows = tree.tokens[:, -new:], tree.ancestors[:, -new:], tree.depth
                logits, stream = read_rows(draft, params.draft, stream, *rows)
        proposed, places = pruned(tree, jnp.concatenate(laws, axis=1), width)
        drafted = (proposed.parent >= 0).sum(axis=1, dtype=jnp.int32)
        return proposed, DySpecState(stream, places), drafted, jnp.full_like(drafted, options.depth)

    def observe(params: Any, state: DySpecState, seen: Seen) -> DySpecState:
        path = jnp.take_along_axis(state.places, seen.verified.rows, axis=1)
        path = seen.verified.replace(rows=path)
        return state.replace(stream=keep(state.stream, path, seen.verified.tokens, sum(sizes[:-1])))

    drafter = Drafter(width, options.depth + 1, "rrs_wor", init, propose, observe)
    return make_speculative(model, drafter, stop_tokens)


DYSPEC = Method("exact", DySpecOptions, make_dyspec, temperature=0.0, drafts=True)
