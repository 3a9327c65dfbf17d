"""What a group of beams is kept from: terms that are taken off the scores of next tokens which resemble the texts that
earlier groups have chosen at the same step ("Diverse Beam Search", 1610.02424, section 4).

Each term is a function of what was `Chosen` and gives f32[B, 1 or W, V], for each next token of the W texts of a group.
Beams are counted, not sets: two beams with one token count twice.

Axis letters: B batch, W texts of the group, H texts of earlier groups, N room for new tokens, V vocabulary, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.kernels import PRECISION


@struct.dataclass
class Chosen:
    """What a group sees before it chooses.

    Attributes:
        own: i32[B, W, N], its texts, of `places` tokens.
        texts: i32[B, H, N], the texts that earlier groups run on with, of `places` + 1 tokens.
        counted: bool[B, H], which of them there are: later groups have not chosen yet, finished ones choose no more.
        places: i32[B].
    """

    own: jax.Array
    texts: jax.Array
    counted: jax.Array
    places: jax.Array

    @property
    def newest(self) -> jax.Array:
        """i32[B, H], the tokens that earlier groups have just chosen."""
        return jnp.take_along_axis(self.texts, self.places[:, None, None], axis=2)[..., 0]


def hamming(chosen: Chosen, vocab: int) -> jax.Array:
    """Returns f32[B, 1, V]: how many earlier beams have just chosen the token."""
    batch = jnp.arange(len(chosen.places))[:, None]
    counts = jnp.zeros((len(chosen.places), vocab), jnp.float32)
    return counts.at[batch, chosen.newest].add(chosen.counted.astype(jnp.float32))[:, None, :]


def cumulative(chosen: Chosen, vocab: int, gamma: jax.Array) -> jax.Array:
    """Returns f32[B, W, V]: the sum over earlier beams of exp(-m / gamma), where m counts the places at which the text
    with the token would differ from theirs; `gamma` f32[B]. Beams that have long parted hold each other off no more.

    The paper adds up the differences of all pairs of beams in one exponent; here each pair has an exponent of its own,
    so that more beams do not make the term vanish.
    """
    place = jnp.arange(chosen.own.shape[2])
    before = place[None, :] < chosen.places[:, None]
    differ = (chosen.own[:, :, None, :] != chosen.texts[:, None, :, :]) & before[:, None, None, :]
    mismatches = differ.sum(axis=-1).astype(jnp.float32)
    alike = jnp.where(chosen.counted[:, None, :], jnp.exp(-mismatches / gamma[:, None, None]), 0.0)
    apart = alike * jnp.exp(-1.0 / gamma)[:, None, None]
    batch, width, _ = alike.shape
    newest = jnp.broadcast_to(chosen.newest[:, None, :], alike.shape)
    rows, own = jnp.arange(batch)[:, None, None], jnp.arange(width)[None, :, None]
    more = jnp.zeros((batch, width, vocab), jnp.float32).at[rows, own, newest].add(alike - apart)
    return more + apart.sum(axis=-1, keepdims=True)


def ngram(chosen: Chosen, vocab: int, n: int) -> jax.Array:
    """Returns f32[B, W, V]: how often the n-gram that the token would complete stands in texts of earlier groups."""
    batch, width, room = chosen.own.shape
    place = jnp.arange(room)
    fits = (place[None, :] >= n - 1) & (place[None, :] <= chosen.places[:, None])
    fits = fits[:, None, :] & chosen.counted[..., None]
    same = jnp.broadcast_to(fits[:, None], (batch, width, *fits.shape[1:]))
    for back in range(1, n):
        at = jnp.maximum(chosen.places - back, 0)[:, None, None]
        ours = jnp.take_along_axis(chosen.own, at, axis=2)[:, :, None, :]
        same &= ours == jnp.roll(chosen.texts, back, axis=2)[:, None]
    same &= (chosen.places >= n - 1)[:, None, None, None]
    tokens = jnp.broadcast_to(chosen.texts[:, None], same.shape)
    rows, own = jnp.arange(batch)[:, None, None, None], jnp.arange(width)[None, :, None, None]
    return jnp.zeros((batch, width, vocab), jnp.float32).at[rows, own, tokens].add(same.astype(jnp.float32))


@struct.dataclass
class Vectors:
    """The model's input embeddings, [D, V], and f32[V], one over their norms."""

    table: jax.Array
    scale: jax.Array


def vectors(params: Any) -> Vectors:
    """Returns the vectors that `embedding` compares."""
    table = params.get("decoder", params)["embedding"]["embedding"].astype(jnp.float32)
    norm = jnp.linalg.norm(table, axis=0)
    return Vectors(table, 1 / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))


def embedding(chosen: Chosen, memory: Vectors) -> jax.Array:
    """Returns f32[B, 1, V]: the sum over earlier beams of the cosine between the token's vector and that of the token
    they have just chosen, so that words of one meaning hold each other off too.
    """
    units = memory.table[:, chosen.newest] * memory.scale[chosen.newest][None]
    total = jnp.sum(jnp.where(chosen.counted[None], units, 0.0), axis=2)
    return (jnp.einsum("db,dv->bv", total, memory.table, precision=PRECISION) * memory.scale[None, :])[:, None, :]
