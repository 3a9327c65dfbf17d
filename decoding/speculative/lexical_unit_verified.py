"""Lexical units with verification: what a model would write ahead of its turn is a draft that the next pass checks.

The lossless control of `decoding.lexical_unit` (2405.15208), which has the paper and the placeholders: the same weights
and the same look-ahead, but every token is what plain greedy decoding of those weights writes; with a temperature, what
plain sampling's law gives. No threshold: a guess that is wrong costs nothing but its row.

A pass reads the newest token, the K - 1 guesses in a chain behind it, and K - 1 placeholders behind each of these K
rows. The placeholders behind the last row that is kept have guessed what follows the token that the pass adds.

Axis letters: B batch, K tokens of a step at most, W = K * K rows of a pass, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding.lexical_unit import check_placeholder
from decoding.method import Call, Method, Steps, target_params
from decoding.prefill import Prompts
from decoding.sampling import likeliest
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import TokenTree
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class VerifiedUnitOptions:
    """What a pass guesses.

    Attributes:
        longest: K, tokens of a step at most.
        placeholder: the token that stands for one to come; the model was trained with it.
    """

    longest: int = 4
    placeholder: int = 3

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise InputError(f"longest must be at least 2 tokens, got {self.longest}")
        if self.placeholder < 0:
            raise InputError(f"placeholder must be a token id, 0 or more; got {self.placeholder}")


def guess_rows(longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (parent i32[W], depth i32[W], ancestors bool[W, W]): a chain of K rows, then each one's placeholders.

    Row K + i * (K - 1) + j is placeholder j behind row i of the chain.
    """
    ahead = longest - 1
    parent = list(range(-1, longest - 1))
    for row in range(longest):
        first = longest + row * ahead
        parent += [row, *range(first, first + ahead - 1)]
    depth, ancestors = [0], np.eye(len(parent), dtype=bool)
    for row, above in enumerate(parent[1:], 1):
        depth.append(depth[above] + 1)
        ancestors[row] |= ancestors[above]
    return np.array(parent, np.int32), np.array(depth, np.int32), ancestors


def make_lexical_unit_verified(model: Decoder, options: VerifiedUnitOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts with the model's own placeholders."""
    longest = options.longest
    check_placeholder(options.placeholder, model.config.vocab_size)
    shape = guess_rows(longest)
    width = len(shape[0])

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> jax.Array:
        return jnp.full((len(prompts.lengths), longest - 1), options.placeholder, jnp.int32)  # which no text has

    def propose(params: Any, guesses: jax.Array, round_: Round):
        none = jnp.full((len(guesses), width - longest), -1, jnp.int32)
        tokens = jnp.concatenate([round_.last[:, None], guesses, none], axis=1)
        tree = TokenTree(tokens, *(jnp.asarray(x)[None] for x in shape))
        zero = jnp.zeros_like(round_.last)
        return tree, guesses, zero + (longest - 1), zero

    def observe(params: Any, guesses: jax.Array, seen: Seen) -> jax.Array:
        row = jnp.take_along_axis(seen.verified.rows, seen.verified.count[:, None] - 1, axis=1)
        behind = longest + row * (longest - 1) + jnp.arange(longest - 1)[None, :]
        return jnp.take_along_axis(seen.digest, behind, axis=1)

    def embed(params: Any, tree: TokenTree) -> jax.Array:
        token = jnp.full((1, 1), options.placeholder, jnp.int32)
        values = {"params": target_params(params)}
        x = model.apply(values, token, method=lambda module, token: module.embedding(token))
        x = x * jnp.asarray(model.config.embedding_scale, x.dtype)
        return jnp.broadcast_to(x, (*tree.tokens.shape, x.shape[-1]))

    drafter = Drafter(
        width, longest, "node", init, propose, observe, digest=lambda logits, hidden: likeliest(logits), embed=embed
    )
    return make_speculative(model, drafter, stop_tokens)


LEXICAL_UNIT_VERIFIED = Method("exact", VerifiedUnitOptions, make_lexical_unit_verified, temperature=0.0)
