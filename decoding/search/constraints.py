"""What a text may not be: processors that take tokens out of a law, inside jit and for every text of a batch.

    no_repeat_ngram   no n tokens in a row may stand twice in prompt and text
    starts            a text must begin with one of these; behind it it is free

`starts` is a prefix constraint: a closed list of answers is one whose members end in a stop token. What is left of a
law is not made to sum to one again, so that scores stay those of the model. Where nothing is left, a text ends.

Axis letters: B batch, W texts of a row, P bucket of prompts, N room for new tokens, V vocabulary, M starts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from decoding.prefill import Prompts
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What holds for all texts.

    Attributes:
        no_repeat_ngram: n; 0 allows every repetition.
        starts: lists of token ids; none: a text begins as it likes.
    """

    no_repeat_ngram: int = 0
    starts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.no_repeat_ngram < 0:
            raise InputError(f"no_repeat_ngram must be 0 (none) or more tokens, got {self.no_repeat_ngram}")
        try:
            starts = tuple(tuple(int(token) for token in start) for start in self.starts)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"starts must be lists of token ids, got {self.starts!r:.80}: encode text first"
            ) from error
        if not all(starts):
            raise InputError("starts has an empty list of token ids: leave it out")
        object.__setattr__(self, "starts", starts)

    def check(self, vocab: int) -> None:
        """Raises InputError where a start has ids that the vocabulary has not."""
        for start in self.starts:
            if not 0 <= min(start) <= max(start) < vocab:
                raise InputError(f"starts has token ids {start}, but the model has ids 0 to {vocab - 1}")

    @property
    def any(self) -> bool:
        """Whether there is a constraint."""
        return bool(self.no_repeat_ngram or self.starts)

    def apply(self, law: jax.Array, prompts: Prompts, text: jax.Array, places: jax.Array) -> jax.Array:
        """Returns a law without what may not be.

        Args:
            law: f32[B, W, V], logits or log-probabilities of the next token.
            prompts: the batch.
            text: i32[B, W, N], new tokens.
            places: i32[B], how many they are.
        """
        if self.no_repeat_ngram:
            whole = _behind_prompts(prompts, text)
            lengths = jnp.broadcast_to((prompts.lengths + places)[:, None], whole.shape[:2])
            law = jnp.where(repeated(whole, lengths, self.no_repeat_ngram, law.shape[-1]), -jnp.inf, law)
        if self.starts:
            lengths = jnp.broadcast_to(places[:, None], text.shape[:2])
            law = jnp.where(begun(text, lengths, self.starts, law.shape[-1]), law, -jnp.inf)
        return law


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What every method that takes constraints is told, besides its own options.

    Attributes:
        no_repeat_ngram: see `Constraints` for this and the next.
        starts: lists of token ids.
    """

    no_repeat_ngram: int = 0
    starts: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", self.constraints.starts)

    @property
    def constraints(self) -> Constraints:
        """What holds for all texts; raises InputError where it cannot."""
        return Constraints(self.no_repeat_ngram, self.starts)


@dataclasses.dataclass(frozen=True)
class ScoredOptions(TextOptions):
    """`return_scores`: whether the log-probability of every token is returned too, by the model's own law."""

    return_scores: bool = False

    @property
    def lossy(self) -> bool:
        """Whether texts are not those of the model's own law."""
        return self.constraints.any


def repeated(text: jax.Array, lengths: jax.Array, n: int, vocab: int) -> jax.Array:
    """Returns bool[B, W, V]: the tokens that would complete n tokens that stand in text i32[B, W, T] already.

    `lengths` is i32[B, W]. For n = 1 these are all its tokens.
    """
    place = jnp.arange(text.shape[2])[None, None, :]
    same = (place >= n - 1) & (place < lengths[..., None]) & (lengths >= n - 1)[..., None]
    for back in range(1, n):
        ours = jnp.take_along_axis(text, jnp.maximum(lengths - back, 0)[..., None], axis=2)
        same &= jnp.roll(text, back, axis=2) == ours
    rows, own = _rows(text.shape)
    return jnp.zeros((*text.shape[:2], vocab), bool).at[rows, own, text].max(same)


def begun(text: jax.Array, lengths: jax.Array, starts: tuple[tuple[int, ...], ...], vocab: int) -> jax.Array:
    """Returns bool[B, W, V]: the tokens with which texts i32[B, W, N] of `lengths` (i32[B, W]) go on in a start, all
    where a whole start has been written.
    """
    longest = max(map(len, starts))
    table = jnp.asarray([[*start, *[0] * (longest - len(start))] for start in starts], jnp.int32)[None, None]
    ends = jnp.asarray([len(start) for start in starts], jnp.int32)[None, None, :]
    place = jnp.arange(longest)
    written = jnp.pad(text, ((0, 0), (0, 0), (0, longest)))[..., None, :longest]
    counts = place[None, None, None, :] < jnp.minimum(ends, lengths[..., None])[..., None]
    fits = ((written == table) | ~counts).all(axis=-1)
    at = jnp.minimum(lengths, longest - 1)[..., None, None]
    following = jnp.take_along_axis(jnp.broadcast_to(table, (*text.shape[:2], *table.shape[2:])), at, axis=3)[..., 0]
    rows, own = _rows(following.shape)
    allowed = jnp.zeros((*text.shape[:2], vocab), bool).at[rows, own, following].max(fits & (lengths[..., None] < ends))
    return allowed | (fits & (lengths[..., None] >= ends)).any(axis=-1, keepdims=True)


def _behind_prompts(prompts: Prompts, text: jax.Array) -> jax.Array:
    """Returns i32[B, W, P + N]: prompts with the texts behind them."""
    batch, width, room = text.shape
    place = jnp.arange(prompts.tokens.shape[1] + room)[None, :]
    behind = jnp.clip(place - prompts.lengths[:, None], 0, room - 1)
    new = jnp.take_along_axis(text, jnp.broadcast_to(behind[:, None, :], (batch, width, place.shape[1])), axis=2)
    old = jnp.pad(prompts.tokens, ((0, 0), (0, room)))[:, None, :]
    return jnp.where((place < prompts.lengths[:, None])[:, None, :], old, new)


def _rows(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the first two of three axes."""
    return np.arange(shape[0])[:, None, None], np.arange(shape[1])[None, :, None]
