"""One group of beams and its step: what runs, what is finished, and when the group ends.

What counts as finished, and when a group ends, is as in Hugging Face's beam search: of the best (1 + stop tokens) * W
candidates (2 W at least) those that end in a stop token and stand among the first W are finished, with their sum of
log-probabilities over length ** length_penalty as score (the prompt does not count); the best W others run on. At a
row's limit the first W candidates are finished as they are. A text that constraints leave nothing to go on with is
finished too, with what it has.

Two sums are kept of each text: what the search goes by, with what diversity took off, and the plain log-probability,
which texts of different groups are ranked by.

Axis letters: B batch, G groups, W beams of a group, N room for new tokens, K candidates, V vocabulary.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from decoding.sampling import top_tokens
from decoding.search.constraints import Constraints
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Search:
    """What is static in a search.

    Attributes:
        width: beams of a row, in all groups together.
        groups: G; they must be of one size.
        num_return: texts that are returned per row, at most `width`.
        early_stopping: when a group with W finished texts ends. True: at once; False: when no running text has a better
            score than the worst of them, as long as it is now; "never": when none can have, at any length up to the
            limit.
        return_scores: whether the log-probability of every token is returned too.
        constraints: what holds for all texts.
    """

    width: int = 4
    groups: int = 1
    num_return: int = 1
    early_stopping: bool | Literal["never"] = False
    return_scores: bool = False
    constraints: Constraints = Constraints()

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"width must be at least 1 beam, got {self.width}")
        if not 1 <= self.num_return <= self.width:
            raise InputError(f"num_return must be 1 to the width of {self.width} beams, got {self.num_return}")
        if self.groups < 1 or self.width % self.groups:
            raise InputError(f"groups must divide the width of {self.width} beams, got {self.groups}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InputError(f'early_stopping must be true, false or "never", got {self.early_stopping!r}')


@struct.dataclass
class Texts:
    """Texts of a group, [B, W] of them (or of all groups, [B, G, W]).

    Attributes:
        tokens: i32[B, W, N]; 0 from `lengths` on.
        lengths: i32[B, W].
        scores: f32[B, W], what the search goes by: a sum while a text runs, over length ** length_penalty when it is
            finished; -inf where there is no text.
        log_probs: f32[B, W].
        token_log_probs: f32[B, W, N], or None.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    log_probs: jax.Array
    token_log_probs: jax.Array | None


@struct.dataclass
class Group:
    """A group of beams: the texts that run, best first, those that are finished, and bool[B], rows that are done."""

    running: Texts
    finished: Texts
    done: jax.Array


def extend(
    search: Search,
    stop_tokens: tuple[int, ...],
    group: Group,
    law: jax.Array,
    penalty: jax.Array | None,
    places: jax.Array,
    limit: jax.Array,
    own: dict[str, jax.Array],
) -> tuple[Group, jax.Array]:
    """Extends one group of each row by a token; rows in which it is done stay as they are.

    Args:
        search: what is static.
        stop_tokens: ids that finish a text.
        group: the group, [B, W] texts.
        law: f32[B, W, V] log-probabilities.
        penalty: f32[B, 1 or W, V], what is taken off them for the search; None: nothing.
        places: i32[B], tokens of the running texts.
        limit: i32[B], tokens that a text may have.
        own: the rows' settings.

    Returns:
        (the group after it, i32[B, W]: the beam of the group that each running text goes on from).
    """
    width, vocab = law.shape[1:]
    found, parent = _candidates(group.running, law, penalty, places, width * max(2, 1 + len(stop_tokens)))
    token = jnp.take_along_axis(found.tokens, places[:, None, None], axis=2)[..., 0]
    stops = jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))
    at_limit = places + 1 >= limit
    ends = (stops | at_limit[:, None]) & (jnp.arange(token.shape[1])[None, :] < width)
    lengths = (places + 1).astype(jnp.float32)
    closed = jnp.where(ends, found.scores / (lengths ** own["length_penalty"])[:, None], -jnp.inf)
    pools = [group.finished, found.replace(scores=closed)]
    if search.constraints.any:
        so_far = jnp.maximum(places, 1).astype(jnp.float32) ** own["length_penalty"]
        stuck = ~jnp.isfinite(law).any(axis=-1) & (places > 0)[:, None]
        pools.append(group.running.replace(scores=jnp.where(stuck, group.running.scores / so_far[:, None], -jnp.inf)))
    pool = jax.tree.map(lambda *texts: jnp.concatenate(texts, axis=1), *pools)
    finished = take(pool, jax.lax.top_k(pool.scores, width)[1])
    running = found.replace(scores=jnp.where(stops, -jnp.inf, found.scores))
    order = jax.lax.top_k(running.scores, width)[1]
    running, parent = take(running, order), jnp.take_along_axis(parent, order, axis=1)
    horizon = jnp.where((own["length_penalty"] > 0) & (search.early_stopping == "never"), limit, places + 1)
    hope = running.scores[:, 0] / horizon.astype(jnp.float32) ** own["length_penalty"]
    worst = finished.scores[:, -1]
    ended = at_limit | ~(hope > worst)
    if search.early_stopping is True:
        ended |= worst > -jnp.inf
    after = Group(running, finished, ended)
    own_beam = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], parent.shape)
    return jax.tree.map(functools.partial(_where, group.done), (group, own_beam), (after, parent))


def _candidates(
    running: Texts, law: jax.Array, penalty: jax.Array | None, places: jax.Array, count: int
) -> tuple[Texts, jax.Array]:
    """Returns the `count` best continuations [B, K], best first, and i32[B, K]: the beam that each goes on from."""
    batch, width, vocab = law.shape
    scores = running.scores[..., None] + (law if penalty is None else law - penalty)
    flat = scores.reshape(batch, -1)
    top = top_tokens(flat, min(count, width * vocab))
    parent, token = top // vocab, top % vocab
    texts = take(running, parent)
    gained = jnp.take_along_axis(law.reshape(batch, -1), top, axis=1)
    here = (jnp.arange(texts.tokens.shape[2])[None, :] == places[:, None])[:, None, :]
    single = texts.token_log_probs
    texts = texts.replace(
        tokens=jnp.where(here, token[..., None], texts.tokens),
        lengths=texts.lengths + 1,
        scores=jnp.take_along_axis(flat, top, axis=1),
        log_probs=texts.log_probs + gained,
        token_log_probs=None if single is None else jnp.where(here, gained[..., None], single),
    )
    return texts, parent


def first_groups(search: Search, shape: tuple[int, ...], room: int, done: jax.Array) -> Group:
    """Returns groups of `shape` (B, G, W) before the first step, in which one beam of each is there to be extended."""
    zeros, none = jnp.zeros(shape, jnp.float32), jnp.full(shape, -jnp.inf)
    single = jnp.zeros((*shape, room), jnp.float32) if search.return_scores else None
    empty = Texts(jnp.zeros((*shape, room), jnp.int32), jnp.zeros(shape, jnp.int32), none, zeros, single)
    first = jnp.broadcast_to(jnp.arange(shape[2]) == 0, shape)
    running = empty.replace(scores=jnp.where(first, 0.0, -jnp.inf))
    return Group(running, empty, jnp.broadcast_to(done[:, None], shape[:2]))


def take(texts: Texts, index: jax.Array) -> Texts:
    """Returns texts `index` (i32[B, K]) of [B, W] texts."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1), texts
    )


def _where(old_stays: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns `old` in the rows where bool[B] says so, else `new`."""
    return jnp.where(old_stays.reshape(-1, *(1,) * (old.ndim - 1)), old, new)
