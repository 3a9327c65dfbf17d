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
from decoding.speculative.tree import TokenTree, chain
from decoding.state import write_tokens
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class PromptLookupOptions:
    """Tokens copied per step, and the longest n-gram that is looked up."""

    length: int = 7
    longest: int = 3

    def __post_init__(self) -> None:
        if self.length < 1 or self.longest < 1:
            raise InputError(f"length and longest must be at least 1, got {self.length} and {self.longest}")


@struct.dataclass
class Text:
    """Prompt and output: tokens i32[B, N], and lengths i32[B] up to which they are real."""

    tokens: jax.Array
    lengths: jax.Array


def look_up(text: Text, length: int, longest: int) -> tuple[jax.Array, jax.Array]:
    """Returns (i32[B, D] tokens copied, bool[B] whether any n-gram stood before)."""
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
    return jnp.take_along_axis(text.tokens, slots, axis=1), found >= 0


def make_prompt_lookup(model: Decoder, options: PromptLookupOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts a chain of `options.length` copied tokens."""
    template = chain(options.length)

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> Text:
        room = max(slots - prompts.tokens.shape[1], 0) + template.width
        return Text(jnp.pad(prompts.tokens, ((0, 0), (0, room))), prompts.lengths)

    def propose(params: Any, text: Text, round_: Round) -> tuple[TokenTree, Text, jax.Array, jax.Array]:
        copied, found = look_up(text, options.length, options.longest)
        tree = template.tree(jnp.concatenate([round_.last[:, None], copied], axis=1))
        parent = jnp.where(found[:, None], tree.parent, -1)
        drafted = jnp.where(found, options.length, 0)
        return tree.replace(parent=parent), text, drafted, jnp.zeros_like(drafted)

    def observe(params: Any, text: Text, seen: Seen) -> Text:
        tokens = write_tokens(text.tokens, text.lengths, seen.verified.tokens, seen.emitted)
        return Text(tokens, text.lengths + seen.emitted)

    drafter = Drafter(template.width, options.length + 1, "node", init, propose, observe, smaller=(1,))
    return make_speculative(model, drafter, stop_tokens)


PROMPT_LOOKUP = Method("exact", PromptLookupOptions, make_prompt_lookup, temperature=0.0)
