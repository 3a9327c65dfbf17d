"""What keeps a router of experts healthy in training, from the scores that `models.moe.MoE` sows.

Sources: balance loss (Switch Transformers, 2101.03961, equations 4 to 6; over all layers at once and with K experts of
a token, as Hugging Face's Mixtral has it), z-loss (ST-MoE, 2202.08906, equation 5).

Axis letters: B rows, T tokens, E experts, K experts of a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.config import DecoderConfig, MoEConfig

LOSSES = ("balance_loss", "router_z_loss")  # the names that they are logged by


def router_losses(config: DecoderConfig, routing: Mapping[str, Any], real: jax.Array) -> dict[str, jax.Array]:
    """Returns the losses of a model's routers, each times its weight in the config; none for a model without.

    Args:
        config: the model. Its mixtures have equally many experts and the same weights of losses.
        routing: the collection `models.moe.ROUTING` that a forward pass left.
        real: bool[B, T], the tokens that count (no padding).

    Returns:
        {"balance_loss": f32[], "router_z_loss": f32[]}, without those whose weight is zero.
    """
    layers = {index: block.mlp for index, block in enumerate(config.blocks) if isinstance(block.mlp, MoEConfig)}
    if not layers:
        return {}
    scores = [routing[f"layers_{index}"]["mlp"]["scores"][0] for index in layers]
    mixture = next(iter(layers.values()))
    found = {}
    if mixture.balance_weight:
        found["balance_loss"] = mixture.balance_weight * balance_loss(scores, mixture.top_k, real)
    if mixture.z_weight:
        found["router_z_loss"] = mixture.z_weight * z_loss(scores, real)
    return found


def balance_loss(scores: Sequence[jax.Array], top_k: int, real: jax.Array) -> jax.Array:
    """Returns E sum_e f_e p_e, f32[]: K where all experts get as many tokens and as much probability.

    f_e is how many of a token's K choices are e, p_e the router's probability of e, both averaged over the tokens that
    count (`real`, bool[B, T]) of all layers (`scores`: f32[B, T, E] each).
    """
    num_experts, weight = scores[0].shape[-1], real.astype(jnp.float32)[..., None]
    chosen = probability = jnp.zeros((num_experts,))
    for layer in scores:
        best = jax.nn.one_hot(jax.lax.top_k(layer, top_k)[1], num_experts).sum(axis=-2)
        chosen = chosen + (best * weight).sum(axis=(0, 1))
        probability = probability + (jax.nn.softmax(layer, axis=-1) * weight).sum(axis=(0, 1))
    total = jnp.maximum(weight.sum() * len(scores), 1.0)
    return num_experts * jnp.sum(chosen / total * (probability / total))


def z_loss(scores: Sequence[jax.Array], real: jax.Array) -> jax.Array:
    """Returns the mean over tokens that count, and over layers, of log(sum_e exp(score_e))^2: f32[]."""
    weight = real.astype(jnp.float32)
    total = sum(jnp.sum(jnp.square(jax.nn.logsumexp(layer, axis=-1)) * weight) for layer in scores)
    return total / jnp.maximum(weight.sum() * len(scores), 1.0)
