"""One token per step: greedy decoding and sampling. Greedy is the reference that every `exact` method is compared
with.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts, prompt_tokens
from decoding.sampling import Sampling, draw, likeliest, process_logits, step_keys
from decoding.state import DecodeState, emit
from models.cache import KVCache, commit
from models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The methods of this file have no static options."""


@struct.dataclass
class SampleCarry:
    """What sampling keeps: the rows' settings, one key per row, and bool[B, V], the tokens that prompt and output have
    seen.
    """

    sampling: Sampling
    keys: jax.Array
    seen: jax.Array


def target_step(model: Decoder, params: Any, state: DecodeState) -> tuple[jax.Array, DecodeState]:
    """Runs the target on each row's newest token: f32[B, V] logits, and the state with that token in the cache."""
    output = model.apply({"params": params}, state.last[:, None], cache=state.cache)
    cache = commit(output.cache, None, (~state.done).astype(jnp.int32))
    return output.logits[:, 0], state.replace(cache=cache)


def choose(logits: jax.Array, carry: SampleCarry, lengths: jax.Array) -> tuple[jax.Array, SampleCarry]:
    """Returns the next token, i32[B], of logits f32[B, V], and the carry with it; `lengths` i32[B] are new tokens."""
    logits = process_logits(logits, carry.sampling, carry.seen)
    drawn = draw(logits, step_keys(carry.keys, lengths))
    token = jnp.where(carry.sampling.temperature > 0, drawn, likeliest(logits))
    return token, carry.replace(seen=carry.seen.at[jnp.arange(token.shape[0]), token].set(True))


def make_greedy(model: Decoder, options: NoOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Greedy decoding: always the most likely token (the first one on a tie)."""

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> None:
        return None

    def step(params: Any, state: DecodeState) -> DecodeState:
        logits, state = target_step(model, params, state)
        token = likeliest(logits)
        return emit(state, token[:, None], jnp.ones_like(token), stop_tokens)

    return Steps(init, step)


def make_sample(model: Decoder, options: NoOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Sampling with temperature, top-k, top-p, min-p and repetition penalty (`decoding.sampling`)."""

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> SampleCarry:
        return SampleCarry(call.sampling, call.keys, prompt_tokens(prompts, model.config.vocab_size))

    def step(params: Any, state: DecodeState) -> DecodeState:
        logits, state = target_step(model, params, state)
        token, carry = choose(logits, state.carry, state.lengths)
        return emit(state.replace(carry=carry), token[:, None], jnp.ones_like(token), stop_tokens)

    return Steps(init, step)


GREEDY = Method("exact", NoOptions, make_greedy)
SAMPLE = Method("distribution", NoOptions, make_sample, temperature=1.0)
