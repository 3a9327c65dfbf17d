"""One token per step: greedy decoding and sampling. Greedy is the reference that every `exact` method is compared
with; `sampling_steps` with a `Policy` is how another kind of attention decodes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.method import Call, Method, Policy, Steps
from decoding.prefill import Prompts, prompt_tokens
from decoding.sampling import Sampling, draw, likeliest, process_logits, step_keys
from decoding.state import DecodeState, emit
from models.attention import TreeRows
from models.cache import KVCache, commit
from models.decoder import Decoder

DENSE = Policy()


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The methods of this file have no static options."""


@struct.dataclass
class SampleCarry:
    """What sampling keeps: the rows' settings, one key per row, bool[B, V], the tokens that prompt and output have
    seen, and what the attention policy remembers.
    """

    sampling: Sampling
    keys: jax.Array
    seen: jax.Array
    memory: Any = None


def target_step(
    model: Decoder, params: Any, state: DecodeState, policy: Policy = DENSE, memory: Any = None
) -> tuple[jax.Array, Any, DecodeState]:
    """Runs the target on each row's newest token.

    Returns:
        f32[B, V] logits, what the policy remembers, and the state with that token in the cache.
    """
    rows = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32), memory)
    output = model.apply({"params": params}, state.last[:, None], cache=state.cache, attend=policy.attend, ctx=rows)
    cache = commit(output.cache, None, (~state.done).astype(jnp.int32))
    return output.logits[:, 0], output.aux.memory, state.replace(cache=cache)


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
        logits, _, state = target_step(model, params, state)
        token = likeliest(logits)
        return emit(state, token[:, None], jnp.ones_like(token), stop_tokens)

    return Steps(init, step)


def sampling_steps(model: Decoder, stop_tokens: tuple[int, ...], policy: Policy = DENSE) -> Steps:
    """Returns the steps of sampling (greedy rows have temperature 0), with the target attending as `policy` says."""

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> SampleCarry:
        seen = prompt_tokens(prompts, model.config.vocab_size)
        return SampleCarry(call.sampling, call.keys, seen, policy.init(cache))

    def step(params: Any, state: DecodeState) -> DecodeState:
        logits, memory, state = target_step(model, params, state, policy, state.carry.memory)
        token, carry = choose(logits, state.carry.replace(memory=memory), state.lengths)
        return emit(state.replace(carry=carry), token[:, None], jnp.ones_like(token), stop_tokens)

    return Steps(init, step, policy)


def make_sample(model: Decoder, options: NoOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Sampling with temperature, top-k, top-p, min-p and repetition penalty (`decoding.sampling`)."""
    return sampling_steps(model, stop_tokens)


GREEDY = Method("exact", NoOptions, make_greedy, encoders=True)
SAMPLE = Method("distribution", NoOptions, make_sample, temperature=1.0, encoders=True)
