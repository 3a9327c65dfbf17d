"""A second model that drafts: its own cache, kept in step with the text, and draws from its laws.

The draft's cache holds the text up to the newest token, which each step reads first. One more token may be missing: of
an accepted path only rows that had children were read by the draft, so that its last row can be a token that the draft
has yet to see (`DraftStream.behind`).

Axis letters: B batch, T rows of a level, R rows of the tree below row 0, W tree rows, V vocabulary, C children per row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decoding.prefill import Prompts, prefill
from decoding.sampling import Sampling, draw, likeliest, probabilities, top_tokens
from decoding.speculative.drafter import Round
from decoding.speculative.target import Verified
from models.attention import TreeRows, tree_attend
from models.cache import KVCache, commit
from models.decoder import Decoder, next_positions
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class DraftOptions:
    """What every method with a draft model can be told: the model, and a temperature of its own.

    The model must be given. Without a temperature (None) drafts are drawn at the row's, and by rank in greedy rows.
    """

    draft: Decoder | None = None
    draft_temperature: float | None = None

    def __post_init__(self) -> None:
        if self.draft_temperature is not None and not self.draft_temperature > 0:
            raise InputError(
                f"draft_temperature must be above 0, or None for the row's own; got {self.draft_temperature}"
            )


@struct.dataclass
class DraftStream:
    """The draft model's side of the text.

    Attributes:
        cache: every token of the text but the newest, and but `behind` where it is `lacking`.
        behind: i32[B], the token before the newest.
        lacking: bool[B], whether the cache lacks it.
    """

    cache: KVCache
    behind: jax.Array
    lacking: jax.Array


def check_draft(model: Decoder, draft: Decoder | None, method: str) -> Decoder:
    """Returns the draft; raises InputError where there is none, or one with another vocabulary."""
    if not isinstance(draft, Decoder):
        raise InputError(
            f"method {method!r} drafts with a second model: pass draft=MODEL (and WithDraft as params), got draft="
            f"{draft!r:.80}"
        )
    if draft.config.vocab_size != model.config.vocab_size:
        raise InputError(
            f"the draft model has {draft.config.vocab_size} token ids, the target {model.config.vocab_size}: they must "
            "share one tokenizer"
        )
    return draft


def start_stream(draft: Decoder, params: Any, prompts: Prompts, slots: int) -> DraftStream:
    """Reads the prompts into a cache of `slots` slots."""
    cache = prefill(draft, params, prompts, slots)
    return DraftStream(cache, jnp.zeros_like(prompts.lengths), jnp.zeros(prompts.lengths.shape, bool))


def read_newest(draft: Decoder, params: Any, stream: DraftStream, round_: Round) -> tuple[jax.Array, DraftStream]:
    """Reads the newest token, and the one before where it is lacking: f32[B, V] logits, and the stream with both."""
    first = jnp.where(stream.lacking, stream.behind, round_.last)
    tokens = jnp.stack([first, jnp.where(stream.lacking, round_.last, 0)], axis=1)

    def forward(module, tokens):
        positions = next_positions(tokens, stream.cache)
        x, _, cache, _ = module.layers(module.embed(tokens, positions), positions, stream.cache)
        newest = jnp.take_along_axis(x, stream.lacking.astype(jnp.int32)[:, None, None], axis=1)
        return module.unembed(newest)[:, 0], cache

    logits, cache = draft.apply({"params": params}, tokens, method=forward)
    cache = commit(cache, None, jnp.where(round_.done, 0, 1 + stream.lacking.astype(jnp.int32)))
    return logits, stream.replace(cache=cache)


def read_rows(
    draft: Decoder, params: Any, stream: DraftStream, tokens: jax.Array, ancestors: jax.Array, depth: jax.Array
) -> tuple[jax.Array, DraftStream]:
    """Reads one level of a tree.

    Args:
        draft: the draft model.
        params: its parameters.
        stream: with the newest token and all upper levels read.
        tokens: i32[B, T], the level's tokens.
        ancestors: bool[B or 1, T, 1 + R], of the level's rows among the rows of the tree so far, row 0 first.
        depth: i32[B or 1, 1 + R], of the rows so far.

    Returns:
        (f32[B, T, V] logits, stream with the level's rows written behind its length).
    """
    below = TreeRows(ancestors[:, :, 1:], depth[:, 1:] - 1)  # row 0 is in the cache already
    positions = stream.cache.length[:, None] + below.depth[:, -tokens.shape[1] :]
    output = draft.apply({"params": params}, tokens, positions, stream.cache, tree_attend, below)
    return output.logits, stream.replace(cache=output.cache)


def keep(stream: DraftStream, verified: Verified, tokens: jax.Array, read: jax.Array | int) -> DraftStream:
    """Keeps the accepted path in the draft's cache.

    Args:
        stream: as `read_rows` left it.
        verified: the path, in the draft's own numbering of rows.
        tokens: i32[B, A], the accepted tokens (`Verified.tokens`).
        read: one number, or i32[B]; rows 1..read-1 stand in the cache, in order, behind its length.
    """
    accepted = verified.count - 1
    rows = verified.rows[:, 1:]
    last = jnp.take_along_axis(verified.rows, accepted[:, None], axis=1)[:, 0]
    lacking = (accepted > 0) & (last >= read)
    behind = jnp.take_along_axis(tokens, jnp.maximum(accepted - 1, 0)[:, None], axis=1)[:, 0]
    cache = commit(stream.cache, jnp.maximum(rows - 1, 0), accepted - lacking.astype(jnp.int32))
    return DraftStream(cache, behind, lacking)


def draft_law(logits: jax.Array, round_: Round, temperature: float | None) -> jax.Array:
    """Returns the law to draft from, f32[B, T, V], of logits f32[B, T, V].

    Settings are the row's own, but for a `temperature` of the draft's own; what the tree's path adds to the tokens
    seen does not count (any law will do for a draft). Greedy rows get the law at temperature 1 where the draft has no
    temperature of its own: they are drafted by rank (`draw_children`).
    """
    own = round_.call.sampling
    warmth = jnp.where(own.temperature > 0, own.temperature, 1.0) if temperature is None else temperature
    settings = own.replace(temperature=jnp.broadcast_to(jnp.asarray(warmth, jnp.float32), own.temperature.shape))

    def law(logits: jax.Array, settings: Sampling) -> jax.Array:
        return probabilities(logits, settings, round_.seen)

    return jax.vmap(law, (1, None), 1)(logits, settings)


def by_rank(round_: Round, temperature: float | None) -> jax.Array:
    """bool[B]: rows whose children are the likeliest tokens, without a draw: greedy ones, unless the draft is warm."""
    return (round_.call.sampling.temperature == 0) & (temperature is None)


def draw_next(
    logits: jax.Array, round_: Round, step: jax.Array, temperature: float | None
) -> tuple[jax.Array, jax.Array]:
    """Draws the next token of each row's chain.

    Args:
        logits: f32[B, V], the draft's behind the chain so far.
        round_: what the drafter may look at.
        step: i32[], tokens drafted so far in this round.
        temperature: the draft's own, or None for the row's (greedy rows then take the likeliest token).

    Returns:
        (i32[B] tokens, f32[B, V] the laws that they were drawn from).
    """
    law = draft_law(logits[:, None], round_, temperature)[:, 0]
    keys = jax.vmap(jax.random.fold_in, (0, None))(round_.keys, step)
    return jnp.where(by_rank(round_, temperature), likeliest(law), draw(jnp.log(law), keys)), law


def noise(keys: jax.Array, shape: tuple[int, ...], ranked: jax.Array) -> jax.Array:
    """Returns Gumbel noise f32[B, *shape]; zero for rows that are ranked (bool[B])."""

    def gumbel() -> jax.Array:
        drawn = jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)
        return jnp.where(ranked.reshape(-1, *(1 for _ in shape)), 0.0, drawn)

    return jax.lax.cond(ranked.all(), lambda: jnp.zeros((len(ranked), *shape), jnp.float32), gumbel)


def draw_children(law: jax.Array, count: int, keys: jax.Array, ranked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws `count` children per row without replacement, in draw order (Gumbel top-k).

    Args:
        law: f32[B, T, V].
        count: C.
        keys: one key per batch row.
        ranked: bool[B], batch rows that take the likeliest tokens in place of a draw.

    Returns:
        (i32[B, T, C] tokens, bool[B, T, C] whether there was one left to draw).
    """
    scores = jnp.log(law) + noise(keys, law.shape[1:], ranked)
    tokens = top_tokens(scores, count)
    return tokens, jnp.take_along_axis(law, tokens, axis=-1) > 0
