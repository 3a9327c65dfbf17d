"""Prompt lookup: copy what followed the last n-gram where it stood before.

Source: Saxena, "Prompt Lookup Decoding" (2023), and LLMA (2304.04487). n goes from `longest` down to 1, as there. Of
several earlier places the latest one is copied, not the first: text in hand predicts itself better than text far back.
A copy that reaches the end of the text goes on with its own beginning, so that a loop is drafted whole.

Axis letters: B batch, N text, D tokens copied.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.loop import make_speculative
from decoding.speculative.sizing import Estimate, LatencyCurve, best_size, check_latency, no_estimate
from decoding.speculative.tree import TokenTree, chain
from decoding.state import write_tokens
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class PromptLookupOptions:
    """Tokens copied per step, and the longest n-gram that is looked up.

    With `latency` (`decoding.speculative.sizing`) each step copies as many tokens as pay on this machine.
    """

    length: int = 7
    longest: int = 3
    latency: LatencyCurve | None = None

    def __post_init__(self) -> None:
        if self.length < 1 or self.longest < 1:
            raise InputError(f"length and longest must be at least 1, got {self.length} and {self.longest}")
        check_latency(self.latency)


@struct.dataclass
class Text:
    """Prompt and output: tokens i32[B, N], and lengths i32[B] up to which they are real."""

    tokens: jax.Array
    lengths: jax.Array


@struct.dataclass
class Draft:
    """The text; what was copied in this step, i32[B, D], behind a match of i32[B] tokens (0: nothing); and for sized
    chains how often copies were right, by the length of the match and the place in the copy.
    """

    text: Text
    copied: jax.Array
    matched: jax.Array
    estimate: Estimate | None


def look_up(text: Text, length: int, longest: int) -> tuple[jax.Array, jax.Array]:
    """Returns (i32[B, D] tokens copied, i32[B] tokens of the n-gram that stood before, 0 where none did)."""
    num = text.tokens.shape[1]
    place = jnp.arange(num)[None, :]

    def matched(back: int) -> jax.Array:
        """bool[B, N]: whether the token `back` before a place equals the one `back` before the last place."""
        last = jnp.take_along_axis(text.tokens, jnp.maximum(text.lengths - 1 - back, 0)[:, None], axis=1)
        moved = jnp.pad(text.tokens, ((0, 0), (back, 0)), constant_values=-1)[:, :num]
        return (moved == last) & (place >= back)

    found = jnp.full(text.lengths.shape, -1)
    ends = place < text.lengths[:, None] - 1  # an n-gram that ends here has something behind it
    for back in range(longest):
        ends &= matched(back)
        found = jnp.maximum(found, jnp.where(ends, num * back + place, -1).max(axis=1))  # longer n-grams win
    start = jnp.where(found >= 0, found % num + 1, 0)
    slots = start[:, None] + jnp.arange(length)[None, :] % (text.lengths - start)[:, None]
    return jnp.take_along_axis(text.tokens, slots, axis=1), jnp.where(found >= 0, found // num + 1, 0)


def gains(estimate: Estimate, matched: jax.Array, length: int) -> jax.Array:
    """Returns f32[B, D]: the chance of each copied token to be accepted, behind matches of i32[B] tokens.

    Before any trial the next token of an n-gram seen before is taken to come again with a chance of n / (n + 1).
    """
    place = jnp.maximum(matched - 1, 0)[:, None], jnp.arange(length)[None, :]
    prior = (matched / (matched + 1)).astype(jnp.float32)[:, None]
    chances = jnp.cumprod(estimate.chance(place, prior), axis=1)
    return jnp.where(matched[:, None] > 0, chances * estimate.honest(), 0.0)


def learned(draft: Draft, seen: Seen) -> Estimate:
    """Returns the estimate with what a step's new tokens say of the copied ones, up to the first that was wrong."""
    length = draft.copied.shape[1]
    hit = draft.copied == seen.verified.tokens[:, :length]
    right = jnp.cumprod(hit, axis=1, dtype=jnp.int32)
    reached = jnp.pad(right[:, :-1], ((0, 0), (1, 0)), constant_values=1) > 0
    tried = reached & (jnp.arange(length)[None, :] < seen.emitted[:, None]) & (draft.matched > 0)[:, None]
    place = jnp.maximum(draft.matched - 1, 0)[:, None], jnp.arange(length)[None, :]
    place = tuple(jnp.broadcast_to(x, hit.shape) for x in place)
    return draft.estimate.counted(place, tried, hit).settled(jnp.maximum(seen.emitted - 1, 0).sum())


def lookup_drafter(options: PromptLookupOptions) -> Drafter:
    """Drafts a chain of `options.length` copied tokens."""
    template = chain(options.length)
    curve = options.latency and options.latency.upto(template.width)
    smaller = tuple(size for size in curve.sizes if size < template.width) if curve else (1,)

    def cold() -> Estimate | None:
        return no_estimate((options.longest, options.length)) if curve else None

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> Draft:
        room = max(slots - prompts.tokens.shape[1], 0) + template.width
        text = Text(jnp.pad(prompts.tokens, ((0, 0), (0, room))), prompts.lengths)
        copied = jnp.zeros((len(prompts.lengths), options.length), jnp.int32)
        return Draft(text, copied, jnp.zeros_like(prompts.lengths), call.warm)

    def propose(params: Any, draft: Draft, round_: Round) -> tuple[TokenTree, Draft, jax.Array, jax.Array]:
        copied, matched = look_up(draft.text, options.length, options.longest)
        estimate, drafted = draft.estimate, jnp.where(matched > 0, options.length, 0)
        if curve:
            chances = gains(estimate, matched, options.length)
            size = jnp.asarray(curve.sizes)[best_size(curve, chances, ~round_.done)]
            drafted = jnp.minimum(drafted, size - 1)
            live = (jnp.arange(options.length)[None, :] < drafted[:, None]) & ~round_.done[:, None]
            estimate = estimate.replace(pending=jnp.where(live, chances, 0.0).sum())
        tree = template.tree(jnp.concatenate([round_.last[:, None], copied], axis=1))
        alive = jnp.arange(template.width)[None, :] <= drafted[:, None]
        tree = tree.replace(parent=jnp.where(alive, tree.parent, -1))
        return tree, Draft(draft.text, copied, matched, estimate), drafted, jnp.zeros_like(drafted)

    def observe(params: Any, draft: Draft, seen: Seen) -> Draft:
        tokens = write_tokens(draft.text.tokens, draft.text.lengths, seen.verified.tokens, seen.emitted)
        text = Text(tokens, draft.text.lengths + seen.emitted)
        return draft.replace(text=text, estimate=learned(draft, seen) if curve else None)

    most = options.length + 1
    return Drafter(template.width, most, "node", init, propose, observe, cold, lambda draft: draft.estimate, smaller)


def make_prompt_lookup(model: Decoder, options: PromptLookupOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Verifies what `lookup_drafter` drafts."""
    return make_speculative(model, lookup_drafter(options), stop_tokens)


PROMPT_LOOKUP = Method("exact", PromptLookupOptions, make_prompt_lookup, temperature=0.0, grammars=True)
