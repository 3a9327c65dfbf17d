"""What a decode function does, as pure functions of a static `Plan`: the one `lax.while_loop` for every method.

What is static (model, method, room for new tokens, stop tokens) is in the hashable plan; what users vary between calls
(prompts inside a bucket, seeds, sampling settings, tokens wanted per row) is an array and compiles nothing.

Axis letters: S cache slots.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from decoding.contexts import with_memory, writer, writer_params
from decoding.method import Call, Steps, target_params, with_kernels
from decoding.prefill import Prompts, encode_prompts, observed_prefill
from decoding.registry import METHODS
from decoding.state import DecodeOutput, DecodeState, init_state
from models.cache import KVCache
from models.dolphin import Dolphin
from models.encoder_decoder import EncoderDecoder, Network


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a decode function: equal plans share their compiled code."""

    model: Network | Dolphin
    method: str
    options: Any
    room: int
    stop_tokens: tuple[int, ...]
    cache_slots: int | None

    @property
    def writer(self) -> Network:
        """The network that writes: the model but for what reads contexts."""
        return writer(self.model)

    def steps(self) -> Steps:
        """Returns the method's functions for this model."""
        return METHODS[self.method].make(self.writer, self.options, self.stop_tokens)

    def num_slots(self, bucket: int) -> int:
        """Returns S for prompts of a bucket: room for the padded prompt, and for every new token or as asked for.

        Where an encoder reads the prompts, the cache holds a start token in their place.
        """
        bucket = 1 if isinstance(self.model, EncoderDecoder) else bucket
        return bucket + self.room + self.steps().rows - 1 if self.cache_slots is None else max(self.cache_slots, bucket)


def start(plan: Plan, params: Any, prompts: Prompts, call: Call, cache: KVCache | None = None) -> DecodeState:
    """Returns the state before the first step. Pure.

    Args:
        plan: what is static.
        params: the model's parameters.
        prompts: the batch.
        call: what the user has set.
        cache: one of the plan's size that holds the prompts but for their last tokens (`decoding.prefill`). None: they
            are read here, as the method reads them; and so they are where it looks on (`Steps.looks_on`), and where the
            model has an encoder for them.
    """
    prompts = with_memory(plan.model, params, prompts)
    params = writer_params(plan.model, params)
    steps, target = plan.steps(), target_params(params)
    seen, observer = None, steps.looks_on
    if isinstance(plan.model, EncoderDecoder):
        cache, prompts = encode_prompts(plan.model, target, prompts, plan.num_slots(1))
    elif cache is None or observer is not None:
        slots = plan.num_slots(prompts.tokens.shape[1])
        cache, seen = observed_prefill(plan.writer, target, prompts, slots, steps.policy.read, observer)
        prompts = prompts.replace(seen=seen)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    carry = steps.init(params, prompts, cache, call)
    state = init_state(steps.policy.keep(cache), last, call.limit, plan.room, steps.most, carry)
    return state if steps.tailor is None else state.replace(kernels=steps.tailor.kernels(target, seen, call))


def advance(plan: Plan, params: Any, state: DecodeState, max_steps: jax.Array) -> DecodeState:
    """Takes steps until every row is done, `max_steps` (i32[]) at most. Pure; the one decoding loop."""
    step, kernels = plan.steps().step, state.kernels
    params = with_kernels(writer_params(plan.model, params), kernels)

    def unfinished(carry):
        taken, state = carry
        return (taken < max_steps) & ~state.done.all()

    def body(carry):
        taken, state = carry
        return taken + 1, step(params, state)

    first = jnp.zeros((), jnp.int32), state.replace(kernels=None)  # which no step changes
    return jax.lax.while_loop(unfinished, body, first)[1].replace(kernels=kernels)


def decode(plan: Plan, params: Any, prompts: Prompts, call: Call) -> DecodeOutput:
    """Decodes a batch from prompts to new tokens. Pure, to be jitted or traced into something larger."""
    state = start(plan, params, prompts, call)
    state = advance(plan, params, state, jnp.asarray(plan.room, jnp.int32))
    return output(plan, state)


def output(plan: Plan, state: DecodeState) -> DecodeOutput:
    """Returns what a state says so far."""
    steps = plan.steps()
    return DecodeOutput(state.tokens, state.lengths, state.stats, steps.warm(state.carry), steps.found(state))
