"""EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling (2310.04691).

Cross-entropy sees the probability of the label alone. EMO adds how far the rest of the law lies from the label when a
move from token i to token j costs 1 - cos(e_i, e_j), e the columns of the head that the model started with. Where all
mass goes to one label y there is one way to move it, so the distance is exact:

    EMO = sum_i q_i (1 - cos(e_i, e_y))

The two losses are mixed with a weight that takes no gradient (`EmoConfig.variant`). The value of variant 1 is the
cross-entropy and that of variant 2 twice the distance: neither says how training goes, so that both are logged apart.

Deviations. The sum leaves out the label itself, whose cost is 0 (the paper's 1 - <e_y, sum_i q_i e_i> is the same
number): in float32 it keeps its digits where the model is sure. q is the law over the tokenizer's ids: vectors and
logits of rows that pad the vocabulary play no part in the distance (they do in the cross-entropy, as in any other
training). Costs are always those of the head at the start; the released code can also follow the head while it is
trained. What the mix divides by is 1e-6 at least, where the released code adds 1e-10: below that, rounding would
decide, and even the sign.

Axis letters: N tokens to be predicted, D width, V vocabulary, I ids of the tokenizer (I <= V).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from finetune.objectives import Objective, label_scores
from models.config import DecoderConfig
from models.errors import InputError
from models.kernels import PRECISION, as_kernel

_EPSILON = 1e-10
_SMALLEST = 1e-6  # what a bracket divides by at least: below it float32 has rounding and no digits


@dataclasses.dataclass(frozen=True)
class EmoConfig:
    """EMO.

    Attributes:
        variant: 1 (language modelling, instruction tuning): (CE + [CE / EMO] EMO) / 2; 2 (light training of a large
            model on further text): [EMO / CE] CE + EMO; no gradient flows into a bracket.
        drop_gold: adds the label's probability, without gradient, to EMO wherever its value is used (later released
            code): the distance no longer falls to 0 where the model is sure, which keeps the brackets small.
        max_ratio: the largest value of a bracket (one file of the released code: 3); None: any.
    """

    type: Literal["emo"] = "emo"
    variant: Literal[1, 2] = 1
    drop_gold: bool = False
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.variant not in (1, 2):
            raise InputError(f"variant must be 1 or 2, got {self.variant}")
        if self.max_ratio is not None and not self.max_ratio > 0:
            raise InputError(f"max_ratio must be above 0 (or null for no limit), got {self.max_ratio}")


def emo(config: EmoConfig, directions: jax.Array) -> Objective:
    """Returns EMO as an objective; it logs `cross_entropy` and `emo`, the distance itself.

    Args:
        config: how the two are mixed.
        directions: f32[D, I] of `head_directions`.
    """

    def ratio(over: jax.Array, under: jax.Array) -> jax.Array:
        bracket = over / jnp.maximum(under, _SMALLEST)
        return jax.lax.stop_gradient(bracket if config.max_ratio is None else jnp.minimum(bracket, config.max_ratio))

    def per_token(logits, labels, constants, context):
        likelihood = jax.nn.logsumexp(logits, axis=-1) - label_scores(logits, labels)
        distance, gold = earth_mover(logits, labels, constants["embedding"])
        used = distance + jax.lax.stop_gradient(gold) if config.drop_gold else distance
        if config.variant == 1:
            value = 0.5 * (likelihood + ratio(likelihood, used) * used)
        else:
            value = ratio(used, likelihood) * likelihood + used
        return value, {"cross_entropy": likelihood, "emo": distance}

    return Objective(per_token, {"embedding": directions})


def earth_mover(logits: jax.Array, labels: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the distance of each law from its label, f32[N] in [0, 2], and the label's probability, f32[N].

    Costs one product with `directions` and one more in the backward pass. Gradients reach the logits alone.

    Args:
        logits: f32[N, V]; those from I on are left out of the law.
        labels: i32[N], below I.
        directions: f32[D, I], columns of length 1 (or 0: at cost 1 from every other token).
    """
    directions = jax.lax.stop_gradient(directions)
    law = jax.nn.softmax(logits[:, : directions.shape[1]], axis=-1)
    is_label = jnp.arange(law.shape[1])[None, :] == labels[:, None]
    others = jnp.where(is_label, 0.0, law)
    mean = jnp.einsum("ni,di->nd", others, directions, precision=PRECISION)
    at_label = jnp.take(directions, labels, axis=1, mode="clip").T
    return others.sum(axis=-1) - jnp.sum(mean * at_label, axis=-1), jnp.where(is_label, law, 0.0).sum(axis=-1)


def head_directions(config: DecoderConfig, params: Any, num_tokens: int) -> jax.Array:
    """Returns the columns of a model's head scaled to length 1, f32[D, I]: a copy, taken after the weights are loaded.

    A head that was never trained has no meaning in its directions, and the distance none either.

    Args:
        config: of the model.
        params: of the model; a tied head is the embedding.
        num_tokens: I; ids of the tokenizer. Columns behind them pad the vocabulary and are left out.
    """
    head = params["embedding"]["embedding"] if config.tied_embeddings else params["unembedding"]["kernel"]
    columns = as_kernel(head).materialize()[:, :num_tokens].astype(jnp.float32)
    return columns / jnp.maximum(jnp.linalg.norm(columns, axis=0, keepdims=True), _EPSILON)


def cosine_spread(directions: jax.Array) -> tuple[float, float]:
    """Returns (mean, standard deviation) of the cosine over all pairs of two different tokens.

    Where the deviation is small beside 1 - mean, all moves cost the same and EMO is little more than the probability
    that is not on the label. Exact, and never I by I: sums over pairs follow from the sum of the columns and from their
    D by D products.
    """
    columns = jnp.asarray(directions, jnp.float32)
    own = jnp.sum(jnp.square(columns), axis=0)
    pairs = float(columns.shape[1] * (columns.shape[1] - 1))
    products = jnp.matmul(columns, columns.T, precision=PRECISION)
    mean = float((jnp.sum(jnp.square(columns.sum(axis=1))) - own.sum()) / pairs)
    square = float((jnp.sum(jnp.square(products)) - jnp.sum(jnp.square(own))) / pairs)
    return mean, max(square - mean**2, 0.0) ** 0.5
