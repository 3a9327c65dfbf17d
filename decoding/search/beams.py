"""Beam search in groups: the one step behind `beam` (a single group) and `diverse_beam`.

A row keeps G groups of W running texts, all of one length, and for each group up to W finished ones. A step reads the
newest tokens of all B*G*W beams in one forward pass and then extends the groups one after another, so that a group can
be kept from what the groups before it have just chosen. The prompt is read once per row; its cache is copied to the
row's beams before the first step, and the beams' caches follow their texts by one gather over the whole pytree. What an
encoder has read of the prompt is the same for all beams of a row, and stays where it is.

Every row ends for itself (`decoding.search.group` says when a group does).

Axis letters: B batch, G groups, W beams of a group, N room for new tokens, K candidates, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.arguments import Setting
from decoding.method import Call, Policy, Steps
from decoding.prefill import Prompts
from decoding.search.constraints import Constraints
from decoding.search.diversity import Chosen
from decoding.search.group import Group, Search, extend, first_groups, take
from decoding.state import DecodeState, Hypotheses, to_room
from models.cache import KVCache, commit, gather_rows, repeat_rows
from models.decoder import Decoder
from models.errors import InputError

LENGTH_PENALTY = Setting(1.0, np.float32, "in [-10, 10]", lambda x: np.abs(x) <= 10)


@struct.dataclass
class SearchCarry:
    """What a search keeps.

    Attributes:
        groups: with axes [B, G, ...].
        last: i32[B, G, W], the running texts' newest tokens.
        places: i32[B], new tokens of each running text.
        own: the rows' settings.
        memory: what the diversity term has made ready.
        prompts: the batch, where constraints look at it; else None.
    """

    groups: Group
    last: jax.Array
    places: jax.Array
    own: dict[str, jax.Array]
    memory: Any
    prompts: Prompts | None


def check_search(model: Decoder, search: Search) -> None:
    """Raises InputError where a group is wider than the vocabulary, as its first step has no more candidates, or where
    constraints name other tokens.
    """
    vocab = model.config.vocab_size
    search.constraints.check(vocab)
    if search.width // search.groups > vocab:
        raise InputError(
            f"width must be at most {vocab * search.groups}, as many beams per group as the vocabulary has tokens; got "
            f"{search.width}"
        )


def search_steps(
    model: Decoder,
    search: Search,
    stop_tokens: tuple[int, ...],
    diversity: Callable[[Chosen, dict[str, jax.Array], Any], jax.Array] | None = None,
    prepare: Callable[[Any], Any] = lambda params: None,
) -> Steps:
    """Returns the steps of a search.

    Args:
        model: the network.
        search: what is static.
        stop_tokens: ids that finish a text.
        diversity: (what earlier groups chose, settings, memory) -> f32[B, 1 or W, V], what is taken off the scores of
            the next tokens.
        prepare: params -> the diversity term's memory.
    """
    beams = search.width

    def init(params: Any, prompts: Prompts, cache: KVCache, call: Call) -> SearchCarry:
        last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)
        last = jnp.broadcast_to(last[:, :, None], (len(call.limit), search.groups, beams // search.groups))
        groups = first_groups(search, last.shape, cache.num_slots, call.limit <= 0)
        kept = prompts if search.constraints.any else None
        return SearchCarry(groups, last, jnp.zeros_like(call.limit), call.own, prepare(params), kept)

    def step(params: Any, state: DecodeState) -> DecodeState:
        carry, active = state.carry, (~state.done).astype(jnp.int32)
        out = model.apply({"params": params}, carry.last.reshape(-1, 1), cache=state.cache)
        cache = commit(out.cache, None, jnp.repeat(active, beams))
        law = jax.nn.log_softmax(out.logits[:, 0].astype(jnp.float32), axis=-1).reshape(*carry.last.shape, -1)
        if carry.prompts is not None:
            law = _constrained(search.constraints, law, carry)
        groups, parent = extend_groups(search, stop_tokens, carry, state.limit, law, diversity)
        newest = jnp.take_along_axis(groups.running.tokens, carry.places[:, None, None, None], axis=3)[..., 0]
        last = jnp.where(groups.done[..., None], carry.last, newest)
        carry = carry.replace(groups=groups, last=last, places=carry.places + active)
        moved = gather_rows(cache.replace(encoded=None), parent).replace(encoded=cache.encoded)
        return _counted(state.replace(cache=moved, carry=carry))

    def found(state: DecodeState) -> Hypotheses:
        return ranked(state.carry, search.num_return, state.tokens.shape[1])

    return Steps(init, step, Policy(keep=lambda cache: repeat_rows(cache, beams)), found=found)


def extend_groups(
    search: Search,
    stop_tokens: tuple[int, ...],
    carry: SearchCarry,
    limit: jax.Array,
    law: jax.Array,
    diversity: Callable[[Chosen, dict[str, jax.Array], Any], jax.Array] | None = None,
) -> tuple[Group, jax.Array]:
    """Extends the groups by one token, one after another.

    Args:
        search: what is static.
        stop_tokens: ids that finish a text.
        carry: the groups before it.
        limit: i32[B], tokens that a text may have.
        law: f32[B, G, W, V], log-probabilities of the next token behind every running text.
        diversity: as for `search_steps`.

    Returns:
        The groups after it, and i32[B, G * W]: the beam of the row that each running text goes on from.
    """
    batch, num_groups, width = carry.last.shape

    def one(others, xs):
        index, group, law = xs
        penalty = None
        if diversity is not None:
            chosen = Chosen(group.running.tokens, *others, carry.places)
            penalty = carry.own["strength"][:, None, None] * diversity(chosen, carry.own, carry.memory)
        after, parent = extend(search, stop_tokens, group, law, penalty, carry.places, limit, carry.own)
        texts, counted = others
        kept = ~group.done[:, None] & (after.running.scores > -jnp.inf)
        texts = jax.lax.dynamic_update_slice_in_dim(texts, after.running.tokens, index * width, axis=1)
        counted = jax.lax.dynamic_update_slice_in_dim(counted, kept, index * width, axis=1)
        return (texts, counted), (after, parent + index * width)

    beams = num_groups * width
    nothing = jnp.zeros_like(carry.groups.running.tokens).reshape(batch, beams, -1), jnp.zeros((batch, beams), bool)
    by_group = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (carry.groups, law))
    _, (groups, parent) = jax.lax.scan(one, nothing, (jnp.arange(num_groups, dtype=jnp.int32), *by_group))
    groups, parent = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), (groups, parent))
    return groups, parent.reshape(batch, beams)


def ranked(carry: SearchCarry, count: int, room: int) -> Hypotheses:
    """Returns the `count` best finished texts of each row, all groups together, by log-probability over length **
    length_penalty; `room` is N.
    """
    texts = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), carry.groups.finished)
    there = texts.scores > -jnp.inf
    length = jnp.maximum(texts.lengths, 1).astype(jnp.float32)
    scores = jnp.where(there, texts.log_probs / length ** carry.own["length_penalty"][:, None], -jnp.inf)
    best = take(texts.replace(scores=scores), jax.lax.top_k(scores, count)[1])
    there = best.scores > -jnp.inf
    single = best.token_log_probs
    return Hypotheses(
        tokens=jnp.where(there[..., None], to_room(best.tokens, room), 0),
        lengths=jnp.where(there, best.lengths, 0),
        scores=best.scores,
        log_probs=jnp.where(there, best.log_probs, -jnp.inf),
        token_log_probs=None if single is None else jnp.where(there[..., None], to_room(single, room), 0.0),
    )


def _constrained(constraints: Constraints, law: jax.Array, carry: SearchCarry) -> jax.Array:
    """Returns f32[B, G, W, V], the law without what constraints take out of it."""
    flat, texts = (x.reshape(len(x), -1, x.shape[3]) for x in (law, carry.groups.running.tokens))
    return constraints.apply(flat, carry.prompts, texts, carry.places).reshape(law.shape)


def _counted(state: DecodeState) -> DecodeState:
    """Counts a step; rows that it ended get their best text."""
    best = ranked(state.carry, 1, state.tokens.shape[1])
    ended = state.carry.groups.done.all(axis=1) & ~state.done
    lengths = jnp.where(ended, best.lengths[:, 0], state.lengths)
    active = (~state.done).astype(jnp.int32)
    steps = state.stats.steps + active
    written = jnp.where(ended, lengths, 0)
    histogram = state.stats.histogram.at[:, 1].add(written).at[:, 0].add(jnp.where(ended, steps - written, 0))
    stats = state.stats.replace(
        steps=steps,
        emitted=state.stats.emitted + written,
        target_calls=state.stats.target_calls + active,
        histogram=histogram,
    )
    tokens = jnp.where(ended[:, None], best.tokens[:, 0], state.tokens)
    return state.replace(tokens=tokens, lengths=lengths, done=state.done | ended, stats=stats)
