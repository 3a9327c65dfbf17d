"""TidalDecode, position persistent sparse attention: some layers choose tokens, those behind them read only these.

Source: "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention" (2410.05076). For each
new token, and only for it:

    layers before the first selection layer    full attention
    selection layers                           full attention; the tokens with the highest scores are chosen
    the others                                 attention to the tokens that the last selection layer chose

Nothing is evicted. Selection layers are 2 and one near the middle (13 of 32 in the paper's Llama-3-8B; the best one is
found by measuring). Every query head chooses its own tokens, as in the released code's path for accuracy; with
`grouped` the query heads of a key/value head choose together, by the sum of their attention weights, so that each token
is read once for all of them. The newest token is always among the `budget`, as in the released kernels.

Keys and values that were made by sparse layers differ from those of a dense pass. With `correct_every`, after that many
steps the tokens read since are read again with full attention in all layers (the paper's cache correction; its results
are without).

Notes: a layer with a sliding window of its own keeps that, and neither chooses nor reads chosen tokens. Rows of a token
tree choose each for itself.

Axis letters: B batch, T new rows, J sets of slots, N slots per set, L layers, R recent tokens.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from decoding.method import Call, Method, Policy, Steps
from decoding.prefill import CHUNK, Prompts, read_tokens
from decoding.sparse.selected import listed_attention, merged, own_window, with_tree
from decoding.sparse.steps import SparseOptions, policy_steps
from decoding.state import DecodeState, run_if
from models.attention import (
    Attend,
    append_rows,
    attention_output,
    attention_scores,
    tree_attend,
    visible_slots,
    visible_softmax,
)
from models.cache import KVCache
from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import InputError

Role = Literal["full", "window", "select", "sparse"]


@dataclasses.dataclass(frozen=True)
class TidalOptions(SparseOptions):
    """What is chosen, where, and how often the cache is corrected.

    Attributes:
        budget: tokens that a sparse layer reads per head, the newest included.
        select: the layers that choose, with one layer at least behind them that reads what they chose; None: the first
            one from 2 on (earlier in a model whose layers would end there) and the first one from 13/32 of the layers
            on.
        grouped: the query heads of a key/value head choose together.
        correct_every: steps between two corrections of the cache, at most 512 or a multiple of it; None: never.
    """

    budget: int = 256
    select: tuple[int, ...] | None = None
    grouped: bool = False
    correct_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select is not None:
            object.__setattr__(self, "select", tuple(sorted(set(self.select))))
        if self.budget < 2:
            raise InputError(f"budget must be at least 2 tokens (the newest is one of them), got {self.budget}")
        every = self.correct_every
        if every is not None and (every < 1 or (every > CHUNK and every % CHUNK)):
            raise InputError(f"correct_every must be 1 to {CHUNK} steps, or a multiple of {CHUNK}; got {every}")
        if every is not None and self.drafted:
            raise InputError("correct_every counts steps of one token: leave out drafted, or correct_every")


def layer_roles(config: DecoderConfig, select: tuple[int, ...] | None) -> tuple[Role, ...]:
    """Returns what each layer does.

    Args:
        config: the model.
        select: the selection layers in order, or None for the default ones.

    Raises:
        InputError: a selection layer that is none of the model's, or has a sliding window; no selection layer at all;
            selection layers behind which none is left to read what they chose; or layers without a window that differ
            in their heads.
    """
    layers = [block.attention for block in config.blocks]
    unbounded = [index for index, layer in enumerate(layers) if layer.window is None]
    if select is None:
        select = _default_selection(unbounded, len(layers))
    elif not select or not set(select) <= set(unbounded):
        raise InputError(
            f"select must name layers without a sliding window, of which this model has {unbounded}; got {list(select)}"
        )
    if len({(layers[index].num_heads, layers[index].num_kv_heads) for index in unbounded}) > 1:
        raise InputError(
            "layers of different numbers of heads cannot share chosen tokens: method 'tidal' needs equal ones"
        )

    def role(index: int) -> Role:
        if index < select[0]:
            return "full"
        if layers[index].window is not None:
            return "window"
        return "select" if index in select else "sparse"

    roles = tuple(role(index) for index in range(len(layers)))
    if "sparse" not in roles:
        raise InputError(
            f"behind the selection layers {list(select)} no layer is left to read what they chose: name earlier ones "
            f"of {unbounded} as select, or take method 'sample'"
        )
    return roles


def _default_selection(unbounded: list[int], num_layers: int) -> tuple[int, ...]:
    """Returns the selection layers among those without a window, the first with such a layer behind it.

    Raises:
        InputError: fewer than two layers without a window.
    """
    if len(unbounded) < 2:
        raise InputError(
            "method 'tidal' needs a layer that chooses tokens and one behind it that reads them, both without a "
            f"sliding window; this model has {len(unbounded)} such layers: take method 'sample'"
        )
    first = next((index for index in unbounded[:-1] if index >= 2), unbounded[-2])
    middle = next((index for index in unbounded[:-1] if index >= 13 * num_layers // 32), first)
    return tuple(sorted({first, max(first, middle)}))


def chosen_slots(scores: jax.Array, weights: jax.Array, start: jax.Array, count: int, grouped: bool) -> jax.Array:
    """Returns i32[B, T, J, N]: the committed slots with the highest scores; J = K where `grouped`, else H.

    Where fewer than N tokens are committed, the rest are slots from `start` on.

    Args:
        scores: f32[B, K, G, T, S].
        weights: their softmax over visible slots; used only by groups, which add them up.
        start: i32[B], committed tokens.
        count: N, at most S.
        grouped: whether the heads of a group choose together.
    """
    ranks = weights.sum(axis=2) if grouped else rearrange(scores, "b k g t s -> b (k g) t s")
    committed = jnp.arange(ranks.shape[-1])[None, None, None, :] < start[:, None, None, None]
    slots = jax.lax.top_k(jnp.where(committed, ranks, -jnp.inf), count)[1]
    return jnp.swapaxes(slots, 1, 2)


def tidal_attend(roles: tuple[Role, ...], budget: int, grouped: bool) -> Attend:
    """Returns the policy. Its context is `TreeRows`, whose memory holds the chosen slots i32[B, T, J, N] from the first
    selection layer to the last layer of a pass, and None between passes: a choice belongs to the rows it was made for.
    """

    def select(q, k, v, cache, ctx, config):
        start, num_slots = cache.length, cache.k.shape[2]
        cache = append_rows(cache, k, v, ctx)
        visible = visible_slots(start, ctx, q.shape[1], num_slots, None)
        scores = attention_scores(q, cache.k, config)
        weights = visible_softmax(scores, visible[:, None, None])
        slots = chosen_slots(scores, weights, start, min(budget - 1, num_slots), grouped)
        return attention_output(weights, cache.v).astype(q.dtype), cache, ctx.replace(memory=slots)

    def sparse(q, k, v, cache, ctx, config):
        start, cache = cache.length, append_rows(cache, k, v, ctx)
        visible = ctx.memory < start[:, None, None, None]
        slots, visible = with_tree(ctx.memory, visible, start, ctx, q.shape[1])
        out = listed_attention(q, cache, range(config.num_kv_heads), slots, visible, config)
        return merged(out, q), cache, ctx

    def attend(q, k, v, cache, ctx, *, config, layer):
        if roles[layer] == "full":
            out, cache, ctx = tree_attend(q, k, v, cache, ctx, config=config, layer=layer)
        elif roles[layer] == "window":
            out, cache, ctx = own_window(q, k, v, cache, ctx, config=config, layer=layer)
        elif roles[layer] == "select":
            out, cache, ctx = select(q, k, v, cache, ctx, config)
        else:
            out, cache, ctx = sparse(q, k, v, cache, ctx, config)
        return out, cache, ctx.replace(memory=None) if layer == len(roles) - 1 else ctx

    return attend


@struct.dataclass
class Recent:
    """What correction keeps beside the carry of sampling: the tokens read since the last one, i32[B, R], and their
    number, i32[] (rows that are not done step together).
    """

    carry: Any
    tokens: jax.Array
    count: jax.Array


def corrected_steps(model: Decoder, steps: Steps, every: int) -> Steps:
    """Returns steps of one token each that, `every` steps, read the tokens since again with dense attention."""

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> Recent:
        tokens = jnp.zeros((len(prompts.lengths), every), jnp.int32)
        return Recent(steps.init(params, prompts, cache, call), tokens, jnp.zeros((), jnp.int32))

    def correct(params: Any, state: DecodeState) -> DecodeState:
        length = state.cache.length
        if every > state.cache.num_slots:
            return state  # which no text is long enough for
        behind = state.cache.replace(length=jnp.maximum(length - every, 0))  # rows that ended early: no longer read
        cache = read_tokens(model, params, state.carry.tokens, behind, every)
        passes = jnp.where(state.done, 0, -(-every // CHUNK))
        return state.replace(
            cache=cache.replace(length=length),
            carry=state.carry.replace(count=jnp.zeros((), jnp.int32)),
            stats=state.stats.replace(target_calls=state.stats.target_calls + passes),
        )

    def read(params: Any, state: DecodeState) -> DecodeState:
        recent = state.carry
        tokens = jax.lax.dynamic_update_slice(recent.tokens, state.last[:, None], (0, recent.count))
        after = steps.step(params, state.replace(carry=recent.carry))
        return after.replace(carry=Recent(after.carry, tokens, recent.count + 1))

    def step(params: Any, state: DecodeState) -> DecodeState:
        # A loop of its own, though it always has its turn: a cache that is written both outside a loop and in it would
        # be copied.
        state = run_if(~state.done.all(), lambda state: read(params, state), state)
        due = (state.carry.count == every) & ~state.done.all()
        return run_if(due, lambda state: correct(params, state), state)

    return steps._replace(init=init, step=step)


def make_tidal(model: Decoder, options: TidalOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Samples (greedily by default) with position persistent sparse attention."""
    roles = layer_roles(model.config, options.select)
    policy = Policy(tidal_attend(roles, options.budget, options.grouped))
    steps = policy_steps(model, policy, options, stop_tokens)
    return steps if options.correct_every is None else corrected_steps(model, steps, options.correct_every)


TIDAL = Method("lossy", TidalOptions, make_tidal, temperature=0.0)
