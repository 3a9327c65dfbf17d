"""One token per step: greedy decoding and sampling. Greedy is the reference that every `exact` method is compared
with; `sampling_steps` with a `Policy` is how another kind of attention decodes.

Both take the constraints of searches (`decoding.search.constraints`), and with `return_scores` say in
`DecodeOutput.found` how likely the model itself held their text and each of its tokens, before any constraint or
temperature. A row for which constraints leave no token ends.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.method import Call, Method, Policy, Steps
from decoding.prefill import Prompts, prompt_tokens
from decoding.sampling import Sampling, draw, likeliest, process_logits, step_keys
from decoding.search.constraints import Constraints, ScoredOptions
from decoding.state import DecodeState, Hypotheses, emit, to_room
from models.attention import TreeRows
from models.cache import KVCache, commit
from models.decoder import Decoder

DENSE = Policy()


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


@struct.dataclass
class TextCarry:
    """What plain sampling keeps; the batch, where constraints look at it; f32[B, S], log-probabilities of new tokens,
    where they are wanted.
    """

    sample: SampleCarry
    prompts: Prompts | None
    log_probs: jax.Array | None


def constrained_steps(model: Decoder, options: ScoredOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Returns the steps of sampling (greedy rows have temperature 0) under constraints, with scores where wanted."""
    constraints, plain = options.constraints, sampling_steps(model, stop_tokens)
    constraints.check(model.config.vocab_size)

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> TextCarry:
        single = jnp.zeros((len(call.limit), cache.num_slots), jnp.float32) if options.return_scores else None
        return TextCarry(plain.init(params, prompts, cache, call), prompts if constraints.any else None, single)

    def step(params: Any, state: DecodeState) -> DecodeState:
        carry = state.carry
        raw, _, state = target_step(model, params, state)
        logits, stuck = _allowed(constraints, raw, carry.prompts, state)
        token, sample = choose(logits, carry.sample, state.lengths)
        log_probs = carry.log_probs
        if log_probs is not None:
            own = jnp.take_along_axis(jax.nn.log_softmax(raw, axis=-1), token[:, None], axis=1)
            here = jnp.arange(log_probs.shape[1])[None, :] == state.lengths[:, None]
            log_probs = jnp.where(here & ~(state.done | stuck)[:, None], own, log_probs)
        state = state.replace(carry=carry.replace(sample=sample, log_probs=log_probs))
        state = emit(state, token[:, None], jnp.where(stuck, 0, 1), stop_tokens)
        return state.replace(done=state.done | stuck)

    def found(state: DecodeState) -> Hypotheses | None:
        if state.carry.log_probs is None:
            return None
        single = to_room(state.carry.log_probs, state.tokens.shape[1])
        total = jnp.where(state.lengths > 0, single.sum(axis=1), -jnp.inf)[:, None]
        return Hypotheses(state.tokens[:, None], state.lengths[:, None], total, total, single[:, None])

    return Steps(init, step, found=found)


def _allowed(
    constraints: Constraints, logits: jax.Array, prompts: Prompts | None, state: DecodeState
) -> tuple[jax.Array, jax.Array]:
    """Returns logits f32[B, V] without what may not be, and bool[B], rows in which nothing may be."""
    if prompts is None:
        return logits, jnp.zeros_like(state.done)
    left = constraints.apply(logits[:, None], prompts, state.tokens[:, None], state.lengths)[:, 0]
    stuck = ~jnp.isfinite(left).any(axis=-1)
    return jnp.where(stuck[:, None], logits, left), stuck


def make_greedy(model: Decoder, options: ScoredOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Greedy decoding: always the most likely token (the first one on a tie) of those that may be."""
    if options != ScoredOptions():
        return constrained_steps(model, options, stop_tokens)

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> None:
        return None

    def step(params: Any, state: DecodeState) -> DecodeState:
        logits, _, state = target_step(model, params, state)
        token = likeliest(logits)
        return emit(state, token[:, None], jnp.ones_like(token), stop_tokens)

    return Steps(init, step)


def make_sample(model: Decoder, options: ScoredOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Sampling with temperature, top-k, top-p, min-p and repetition penalty (`decoding.sampling`)."""
    plain = options == ScoredOptions()
    return sampling_steps(model, stop_tokens) if plain else constrained_steps(model, options, stop_tokens)


GREEDY = Method("exact", ScoredOptions, make_greedy, encoders=True)
SAMPLE = Method("distribution", ScoredOptions, make_sample, temperature=1.0, encoders=True)
