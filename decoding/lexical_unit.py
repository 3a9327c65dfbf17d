"""Lexical Unit Decoding: one pass writes a token and as many more as the model is sure of. Lossy.

Source: "Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs" (LUD; 2405.15208), of
which the abstract and summaries could be read: formulas and constants are a reconstruction. Behind the newest token
stand K - 1 placeholders. The pass says what follows the newest token, which is always kept, and what follows each
placeholder; of these the first ones are kept whose probability is above `threshold`. No pass verifies them. Kept tokens
are read as what they are in the next pass, and placeholders never stay in the cache. With a threshold of 1 or more the
text is plain greedy decoding's, of the same weights; below it is lossy, the lower the more.

The model must know what placeholders ask of it: `finetune.lexical_units` trains that. A placeholder is a token of the
vocabulary that no text has; all of them share it. Repetition control is the simple form: a token that is the one
before it again is not kept ahead of its turn.

Axis letters: B batch, K tokens of a step at most, W = 2K - 1 rows of a pass, V vocabulary.
"""

import dataclasses
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.arguments import Setting
from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.sampling import likeliest
from decoding.state import DecodeState, emit
from models.attention import TreeRows, tree_attend
from models.cache import KVCache, commit
from models.decoder import Decoder
from models.errors import InputError

SETTINGS = MappingProxyType({"threshold": Setting(0.9, np.float32, "above 0", lambda x: x > 0)})


@dataclasses.dataclass(frozen=True)
class LexicalUnitOptions:
    """What a pass tries.

    Attributes:
        longest: K, tokens of a step at most.
        placeholder: the token that stands for one to come; the model was trained with it.
        repeats: whether a token may be kept ahead of its turn that is the one before it again.
    """

    longest: int = 4
    placeholder: int = 3
    repeats: bool = False

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise InputError(f"longest must be at least 1 token, got {self.longest}")
        if self.placeholder < 0:
            raise InputError(f"placeholder must be a token id, 0 or more; got {self.placeholder}")


def check_placeholder(placeholder: int, vocab_size: int) -> None:
    """Raises InputError unless the model has an embedding for the placeholder."""
    if placeholder >= vocab_size:
        raise InputError(
            f"placeholder {placeholder} is no token of the model, which has ids 0 to {vocab_size - 1}: name one in "
            "no text"
        )


@struct.dataclass
class UnitCarry:
    """What is kept: i32[B, K] tokens that no cache holds yet and i32[B], how many; f32[B] thresholds."""

    pending: jax.Array
    count: jax.Array
    threshold: jax.Array


def unit_rows(count: jax.Array, longest: int) -> TreeRows:
    """Returns how the rows of a pass hang together, K of tokens and K - 1 of placeholders.

    Args:
        count: i32[B], how many of the first K rows are tokens, 1 to K; the others are seen by themselves alone.
        longest: K.
    """
    width = 2 * longest - 1
    row = jnp.arange(width)[None, :]
    is_token = row < longest
    real = ~is_token | (row < count[:, None])
    depth = jnp.where(is_token, row, count[:, None] + row - longest)
    before = (row[:, None, :] <= row[:, :, None]) & real[:, None, :] & real[:, :, None]
    return TreeRows(before | jnp.eye(width, dtype=bool)[None], depth)


def sure_tokens(logits: jax.Array, threshold: jax.Array, repeats: bool) -> tuple[jax.Array, jax.Array]:
    """Returns (i32[B, K] likeliest tokens, i32[B] how many from the first on are kept) of logits f32[B, K, V].

    The first is always kept, the others while the probability of each is above the threshold (f32[B]).
    """
    tokens = likeliest(logits)
    sure = jax.nn.softmax(logits, axis=-1).max(axis=-1) > threshold[:, None]
    sure &= (threshold < 1)[:, None]  # which a probability may round to
    if not repeats:
        sure &= tokens != jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return tokens, 1 + jnp.cumprod(sure[:, 1:].astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)


def make_lexical_unit(model: Decoder, options: LexicalUnitOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Writes up to `options.longest` tokens per pass."""
    longest = options.longest
    check_placeholder(options.placeholder, model.config.vocab_size)

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> UnitCarry:
        last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
        return UnitCarry(
            jnp.pad(last, ((0, 0), (0, longest - 1))), jnp.ones_like(prompts.lengths), call.own["threshold"]
        )

    def step(params: Any, state: DecodeState) -> DecodeState:
        carry, cache = state.carry, state.cache
        blanks = jnp.full((len(carry.count), longest - 1), options.placeholder, jnp.int32)
        rows = unit_rows(carry.count, longest)
        output = model.apply(
            {"params": params},
            jnp.concatenate([carry.pending, blanks], axis=1),
            positions=cache.length[:, None] + rows.depth,
            cache=cache,
            attend=tree_attend,
            ctx=rows,
        )
        newest = jnp.take_along_axis(output.logits, carry.count[:, None, None] - 1, axis=1)
        logits = jnp.concatenate([newest, output.logits[:, longest:]], axis=1)
        tokens, count = sure_tokens(logits, carry.threshold, options.repeats)
        cache = commit(output.cache, None, jnp.where(state.done, 0, carry.count))
        after = emit(state.replace(cache=cache), tokens, count, stop_tokens)
        emitted, active = after.lengths - state.lengths, (~state.done).astype(jnp.int32)
        stats = after.stats.replace(
            drafted=state.stats.drafted + (longest - 1) * active,
            accepted=state.stats.accepted + jnp.maximum(emitted - 1, 0),
        )
        carry = carry.replace(pending=tokens, count=jnp.maximum(emitted, 1))
        return after.replace(stats=stats, carry=carry)

    return Steps(init, step, rows=2 * longest - 1, most=longest)


LEXICAL_UNIT = Method("lossy", LexicalUnitOptions, make_lexical_unit, settings=SETTINGS)
