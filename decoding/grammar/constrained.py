"""Decoding inside a grammar: at each step the tokens that the grammar does not allow are masked, and the rest is
sampled as plain sampling does it (greedy by default). Lossy: the law is not the model's law given the grammar
(`decoding.grammar.asap` has that one).

Grammars are an argument of the call, one for all rows or one per row: `decode_fn(params, prompts, grammars=...)`.
Grammars with a table run inside the loop; for others the loop asks the parsing engine on the host, row by row, once per
step. A row ends with a stop token, which is allowed where its text is one of the grammar's; a row that reaches its
limit before holds the beginning of such a text. Where nothing is allowed (the engine does not look ahead to the end, as
the tables do), the row ends.

Source: grammar-constrained decoding as in Grammar-Aligned Decoding (2405.21047), section 2.
"""

import dataclasses
from typing import Any

import jax
from flax import struct

from decoding.autoregressive import SampleCarry, choose, sampling_steps, target_step
from decoding.grammar.bitmask import mask_logits
from decoding.grammar.rows import Constraint
from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.state import DecodeState, emit
from models.cache import KVCache
from models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ConstrainedOptions:
    """There are no static options: a grammar says all."""


@struct.dataclass
class ConstrainedCarry:
    """What plain sampling keeps, and where the rows stand in their grammars; None: no row has one."""

    sample: SampleCarry
    constraint: Constraint | None


def constrain(
    constraint: Constraint | None, logits: jax.Array, state: DecodeState, stop_tokens: tuple[int, ...]
) -> jax.Array:
    """Returns logits f32[B, V] with -inf for what the rows' grammars do not allow behind their tokens so far."""
    if constraint is None:
        return logits
    words, ends = constraint.allowed(state.tokens, state.lengths, state.done, logits.shape[-1])
    return mask_logits(logits, words, ends, stop_tokens)


def make_constrained(model: Decoder, options: ConstrainedOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Sampling, with masked logits."""
    plain = sampling_steps(model, stop_tokens)

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> ConstrainedCarry:
        return ConstrainedCarry(plain.init(params, prompts, cache, call), call.grammar)

    def step(params: Any, state: DecodeState) -> DecodeState:
        logits, _, state = target_step(model, params, state)
        constraint = state.carry.constraint
        logits = constrain(constraint, logits, state, stop_tokens)
        token, sample = choose(logits, state.carry.sample, state.lengths)
        constraint = constraint and constraint.after(token, state.done)
        state = state.replace(carry=ConstrainedCarry(sample, constraint))
        return emit(state, token[:, None], jax.numpy.ones_like(token), stop_tokens)

    return Steps(init, step)


CONSTRAINED = Method("lossy", ConstrainedOptions, make_constrained, temperature=0.0, grammars=True)
