"""Contrastive search: the likely token whose hidden state is least like any before it. Lossy, deterministic.

Source: "Contrastive Search Is What You Need for Neural Text Generation" (2210.14140, section 4), the rule of SimCTG
(2202.06417): of the k most probable tokens the one that maximises (1 - alpha) * p(v) - alpha * max_j cos(h_v, h_j).
h are the hidden states that the head reads, behind the final norm; j runs over prompt and text; p is not normalised
over the k.

The k candidates are read in one pass as a tree of depth 1: each sees the text and itself, and only the chosen one's
keys and values are kept. Nothing is copied k times, and the head reads the chosen row alone. `sequential` reads the
candidates one after another, in k passes, for the same text: attention then takes the memory of one row.

Unlike other methods, this one has every token of the text in its cache, the newest too: its pass chose it.

Axis letters: B batch, P bucket of prompts, S cache slots, D model width, V vocabulary, k candidates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.arguments import Setting
from decoding.method import Call, Method, Policy, Steps
from decoding.prefill import Prompts, hidden_observer
from decoding.sampling import top_tokens
from decoding.search.constraints import TextOptions
from decoding.state import DecodeState, emit
from models.attention import TreeRows, tree_attend
from models.cache import KVCache, commit
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import PRECISION

SETTINGS = {"alpha": Setting(0.6, np.float32, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))}


@dataclasses.dataclass(frozen=True)
class ContrastiveOptions(TextOptions):
    """The number of candidates k, and whether they are read one after another; the setting `alpha`, 0 to 1, weighs the
    likeness (0 is greedy).
    """

    k: int = 5
    sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise InputError(f"k must be at least 1 candidate, got {self.k}")


@struct.dataclass
class ContrastiveCarry:
    """What the method keeps.

    Attributes:
        units: f32[B, S, D], hidden states of the text by position, of length 1.
        tokens: i32[B, k], the candidates for the next token, most probable first.
        chances: f32[B, k], their probabilities.
        allowed: bool[B, k], those that constraints leave.
        alpha: f32[B].
        prompts: the batch, where constraints look at it; else None.
    """

    units: jax.Array
    tokens: jax.Array
    chances: jax.Array
    allowed: jax.Array
    alpha: jax.Array
    prompts: Prompts | None


def likeness(candidates: jax.Array, text: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns f32[B, k]: the largest cosine of each candidate with a state of the text.

    Args:
        candidates: f32[B, k, D], of length 1.
        text: f32[B, S, D], of length 1 up to `lengths`.
        lengths: i32[B].
    """
    cosines = jnp.einsum("bkd,bsd->bks", candidates, text, precision=PRECISION)
    inside = jnp.arange(text.shape[1])[None, :] < lengths[:, None]
    return jnp.where(inside[:, None, :], cosines, -jnp.inf).max(axis=-1)


def make_contrastive(model: Decoder, options: ContrastiveOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Contrastive search; raises InputError where there are more candidates than tokens."""
    if options.k > model.config.vocab_size:
        raise InputError(f"k must be at most the vocabulary's {model.config.vocab_size} tokens, got {options.k}")
    constraints = options.constraints
    constraints.check(model.config.vocab_size)

    def candidates(
        params: Any, states: jax.Array, prompts: Prompts | None, text: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = model.apply({"params": params}, states, method="unembed").astype(jnp.float32)
        if prompts is not None:
            logits = constraints.apply(logits[:, None], prompts, text[:, None], lengths)[:, 0]
        tokens = top_tokens(logits, options.k)
        allowed = jnp.isfinite(jnp.take_along_axis(logits, tokens, axis=1))
        return tokens, jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), tokens, axis=1), allowed

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> ContrastiveCarry:
        states = prompts.seen[0]
        last = jnp.take_along_axis(states, prompts.lengths[:, None, None] - 1, axis=1)[:, 0]
        last = last.astype(params["embedding"]["embedding"].dtype)
        kept = prompts.replace(seen=None) if constraints.any else None
        nothing = jnp.zeros((len(call.limit), 1), jnp.int32), jnp.zeros_like(call.limit)
        found = candidates(params, last, kept, *nothing)
        units = jnp.pad(_units(model, params, states), ((0, 0), (0, cache.num_slots - states.shape[1]), (0, 0)))
        return ContrastiveCarry(units, *found, call.own["alpha"], kept)

    def step(params: Any, state: DecodeState) -> DecodeState:
        carry, length = state.carry, state.cache.length
        states, cache = _read(model, params, carry.tokens, state.cache, options.sequential)
        units = _units(model, params, states)
        alpha = carry.alpha[:, None]
        scores = (1 - alpha) * carry.chances - alpha * likeness(units, carry.units, length)
        scores, stuck = jnp.where(carry.allowed, scores, -jnp.inf), ~carry.allowed.any(axis=1)
        best = jnp.argmax(scores, axis=1).astype(jnp.int32)[:, None]
        token = jnp.take_along_axis(carry.tokens, best, axis=1)
        chosen, unit = (jnp.take_along_axis(x, best[..., None], axis=1)[:, 0] for x in (states, units))
        kept = carry.units.at[jnp.arange(len(length)), length].set(unit, mode="drop")
        active = (~state.done).astype(jnp.int32)
        cache = commit(cache, best, active)
        passes = active * (options.k - 1 if options.sequential else 0)
        stats = state.stats.replace(target_calls=state.stats.target_calls + passes)
        state = emit(state.replace(cache=cache, stats=stats), token, jnp.where(stuck, 0, 1), stop_tokens)
        tokens, chances, allowed = candidates(params, chosen, carry.prompts, state.tokens, state.lengths)
        carry = carry.replace(units=kept, tokens=tokens, chances=chances, allowed=allowed)
        return state.replace(carry=carry, done=state.done | stuck)

    policy = Policy(tree_attend, keep=lambda cache: commit(cache, None, jnp.ones_like(cache.length)))
    return Steps(init, step, policy, options.k + 1, observer=hidden_observer(model.config.width))


def _read(
    model: Decoder, params: Any, tokens: jax.Array, cache: KVCache, sequential: bool
) -> tuple[jax.Array, KVCache]:
    """Reads candidates i32[B, k] behind the text; returns their states [B, k, D] behind the last block."""
    k = tokens.shape[1]
    passes = [(row, row + 1) for row in range(k)] if sequential else [(0, k)]
    states = []
    for start, stop in passes:
        rows = TreeRows(jnp.eye(stop, dtype=bool)[None, start:], jnp.zeros((1, stop), jnp.int32))
        positions = jnp.broadcast_to(cache.length[:, None], (len(tokens), stop - start))

        def blocks(module, tokens, cache=cache, rows=rows, positions=positions):
            x, _, cache, _ = module.layers(module.embed(tokens, positions), positions, cache, tree_attend, rows)
            return x, cache

        x, cache = model.apply({"params": params}, tokens[:, start:stop], method=blocks)
        states.append(x)
    return jnp.concatenate(states, axis=1), cache


def _units(model: Decoder, params: Any, states: jax.Array) -> jax.Array:
    """Returns states [B, T, D] behind the final norm, f32, of length 1."""
    states = model.apply({"params": params}, states, method=lambda module, x: module.final_norm(x)).astype(jnp.float32)
    norm = jnp.linalg.norm(states, axis=-1, keepdims=True)
    return states / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)


CONTRASTIVE = Method("lossy", ContrastiveOptions, make_contrastive, settings=SETTINGS)
