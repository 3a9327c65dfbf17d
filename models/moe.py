"""Mixtures of experts: a router sends each token to a few of E feed-forward layers, whose outputs are added up.

Sources: top-k routing (Mixtral, 2401.04088, section 2.1), balance loss (Switch Transformers, 2101.03961, equations 4 to
6), z-loss (ST-MoE, 2202.08906, equation 5), capacity (GShard, 2006.16668, section 2.2). MoE-X (2503.07639): a router
without parameters that prefers experts of which few neurons are expected to fire.

Four forms compute the same thing. `dense` runs all experts on all tokens: the reference. `capacity` gives each expert a
buffer of fixed size, and drops what does not fit. `ragged` sorts tokens by expert (`jax.lax.ragged_dot`). `loop` runs
the experts that any token has chosen, one after another, on all tokens: measured on CPU with two of eight experts of
1024 x 1024 it was the fastest of the four from 1 to 64 tokens, and is the default there; elsewhere that is `ragged`,
unmeasured. Where experts are spread over devices, `dense` and `capacity` keep each one where it is.

Axis letters: N tokens, D model width, F feed-forward width, E experts, K experts of a token, C buffer rows of an
expert, L layers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import MLPConfig, MoEConfig
from models.errors import InputError
from models.kernels import PRECISION, as_kernel
from models.layers import ACTIVATIONS, MLP, Linear, kernel_init

ROUTING = "routing"  # the collection that `MoE` leaves its router's scores in, for `models.router_losses`
_TINY = 1e-20  # added to a variance: an input of zeros has none


class Experts(NamedTuple):
    """The weights of E feed-forward layers: up [E, D, F], gate [E, D, F] or None, down [E, F, D]."""

    up: jax.Array
    gate: jax.Array | None
    down: jax.Array


class Routes(NamedTuple):
    """Where tokens go: `chosen` i32[N, K], the best expert first, and `weights` f32[N, K], factors on their outputs."""

    chosen: jax.Array
    weights: jax.Array


class MoE(nn.Module):
    """Experts in place of an MLP: [..., D] -> [..., D].

    Parameters: `router` (unless it has none), `experts_up`, `experts_gate` (when gated), `experts_down`, `shared` and
    `shared_gate` (when there is a shared expert). The router's scores, f32[..., E], are sown as `scores` in the
    collection `ROUTING`. In the dense form what enters the down projections, times the router's weights, [..., E * F],
    is sown as `inner` among the "intermediates", as `models.layers.MLP` does: the hidden vector of one wide MLP.
    """

    config: MoEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., D] to [..., D]."""
        config = self.config
        experts, rows = self._experts(x.shape[-1]), x.reshape(-1, x.shape[-1])
        if config.router == "learned":
            scores = Linear(config.num_experts, dtype=jnp.float32, name="router")(rows)
        else:
            scores = sparsity_scores(rows, experts.up if config.router_gradient else jax.lax.stop_gradient(experts.up))
        self.sow(ROUTING, "scores", scores.reshape(*x.shape[:-1], -1))
        routes = route(scores, config)
        form = config.form or ("loop" if jax.default_backend() == "cpu" else "ragged")
        if form == "dense":
            inner = dense_inner(rows, experts, gates(routes, config), config.expert)
            self.sow("intermediates", "inner", inner.reshape(*x.shape[:-1], -1))
            out = dense_outer(inner, experts)
        elif form == "loop":
            out = loop(rows, experts, gates(routes, config), config.expert)
        else:
            out = {"capacity": capacity, "ragged": ragged}[form](rows, experts, routes, config)
        if config.shared is not None:
            gate = Linear(1, dtype=jnp.float32, name="shared_gate")(rows)
            out = out + jax.nn.sigmoid(gate).astype(x.dtype) * MLP(config.shared, name="shared")(rows)
        return out.reshape(x.shape)

    def _experts(self, width: int) -> Experts:
        num, inner = self.config.num_experts, self.config.expert.width
        up = self.param("experts_up", kernel_init, (num, width, inner))
        gate = self.param("experts_gate", kernel_init, (num, width, inner)) if self.config.expert.gated else None
        return Experts(up, gate, self.param("experts_down", kernel_init, (num, inner, width)))


def route(scores: jax.Array, config: MoEConfig) -> Routes:
    """Returns where tokens with router scores f32[N, E] go: to the K best, the lower number first on a tie.

    Weights are the softmax over all experts, or, where the config says `normalise`, over the K chosen ones.
    """
    best, chosen = jax.lax.top_k(scores, config.top_k)
    if config.normalise:
        return Routes(chosen, jax.nn.softmax(best, axis=-1))
    return Routes(chosen, jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), chosen, axis=-1))


def gates(routes: Routes, config: MoEConfig) -> jax.Array:
    """Returns f32[N, E]: the factor on each expert's output, zero where it is not chosen."""
    num = len(routes.chosen)
    return jnp.zeros((num, config.num_experts)).at[jnp.arange(num)[:, None], routes.chosen].set(routes.weights)


def sparsity_scores(x: jax.Array, up: jax.Array) -> jax.Array:
    """Returns f32[N, E], each in [-1, 1]: the higher, the fewer of an expert's neurons are expected to fire.

    MoE-X: an expert's columns of `up` [E, D, F] are taken as draws of a normal law with their own mean and variance
    (over F), so that what enters a neuron, of x [N, D], is normal with mean m and deviation s; a share of
    (1 + erf(m / (s sqrt 2))) / 2 of them is above zero, and the score is -erf(m / (s sqrt 2)).
    """
    x, up = x.astype(jnp.float32), up.astype(jnp.float32)
    mean = jnp.matmul(x, up.mean(axis=-1).T, precision=PRECISION)
    variance = jnp.matmul(jnp.square(x), up.var(axis=-1).T, precision=PRECISION)
    return -jax.lax.erf(mean * jax.lax.rsqrt(2.0 * variance + _TINY))


def dense_inner(x: jax.Array, experts: Experts, gates: jax.Array, config: MLPConfig) -> jax.Array:
    """Returns [N, E, F]: what enters every expert's down projection, of x [N, D], times its gate."""
    inner = _activated(lambda w: jnp.einsum("nd,edf->nef", x, w, precision=PRECISION), experts, config)
    return inner * gates[:, :, None].astype(x.dtype)


def dense_outer(inner: jax.Array, experts: Experts) -> jax.Array:
    """Returns [N, D] of what `dense_inner` gives: one wide layer's down projection."""
    return jnp.einsum("nef,efd->nd", inner, experts.down, precision=PRECISION)


def dense(x: jax.Array, experts: Experts, gates: jax.Array, config: MLPConfig) -> jax.Array:
    """Returns [N, D], the sum of all experts' outputs for x [N, D] times gates f32[N, E]."""
    return dense_outer(dense_inner(x, experts, gates, config), experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def loop(x: jax.Array, experts: Experts, gates: jax.Array, config: MLPConfig) -> jax.Array:
    """Returns what `dense` does; reads the weights of those experts alone that a token has chosen."""
    hit = (gates != 0).any(axis=0)
    order = jnp.argsort(~hit, stable=True)

    def add(index: jax.Array, out: jax.Array) -> jax.Array:
        expert = order[index]
        own = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), experts)
        inner = _activated(lambda w: as_kernel(w).dot(x), own, config)
        return out + gates[:, expert, None].astype(x.dtype) * as_kernel(own.down).dot(inner)

    return jax.lax.fori_loop(0, hit.sum(), add, jnp.zeros_like(x))


def _loop_forward(x, experts, gates, config):
    return loop(x, experts, gates, config), (x, experts, gates)


def _loop_backward(config, values, cotangent):
    """A loop of unknown length has no gradient of its own: it is taken of the dense form."""
    return jax.vjp(lambda *values: dense(*values, config), *values)[1](cotangent)


loop.defvjp(_loop_forward, _loop_backward)


def capacity(x: jax.Array, experts: Experts, routes: Routes, config: MoEConfig) -> jax.Array:
    """Returns [N, D] with C = ceil(capacity_factor N K / E) rows for each expert.

    First choices come before second ones, and earlier tokens before later ones; what finds no room adds nothing.
    """
    num, ranks = routes.chosen.shape
    room = min(num, math.ceil(config.capacity_factor * num * ranks / config.num_experts))
    chosen = routes.chosen.T.reshape(-1)  # by rank, then by token
    before = jnp.cumsum(jax.nn.one_hot(chosen, config.num_experts, dtype=jnp.int32), axis=0) - 1
    place = jnp.take_along_axis(before, chosen[:, None], axis=1)[:, 0]
    nowhere = config.num_experts * room
    slot = jnp.where(place < room, chosen * room + place, nowhere)
    buffers = jnp.zeros((nowhere, x.shape[1]), x.dtype).at[slot].set(jnp.tile(x, (ranks, 1)), mode="drop")
    buffers = buffers.reshape(config.num_experts, room, -1)
    inner = _activated(lambda w: jnp.einsum("ecd,edf->ecf", buffers, w, precision=PRECISION), experts, config.expert)
    out = jnp.einsum("ecf,efd->ecd", inner, experts.down, precision=PRECISION).reshape(nowhere, -1)
    out = out.at[slot].get(mode="fill", fill_value=0.0).reshape(ranks, num, -1)
    return (out * routes.weights.T[:, :, None].astype(x.dtype)).sum(axis=0)


def ragged(x: jax.Array, experts: Experts, routes: Routes, config: MoEConfig) -> jax.Array:
    """Returns [N, D], computed on N * K rows sorted by expert."""
    chosen = routes.chosen.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=config.num_experts).astype(jnp.int32)
    token = order // config.top_k

    def product(rows: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, w, sizes, precision=PRECISION)

    rows = x[token]
    inner = _activated(lambda w: product(rows, w), experts, config.expert)
    out = product(inner, experts.down) * routes.weights.reshape(-1)[order][:, None].astype(x.dtype)
    return jnp.zeros_like(x).at[token].add(out)


def upcycled(
    dense: dict[str, Any], config: MoEConfig, router: jax.Array | None = None, key: jax.Array | None = None
) -> dict[str, Any]:
    """Returns the parameters of a `MoE` that starts as a trained MLP, with as many neurons in an expert as fit.

    Experts as wide as the MLP are copies of it: the outputs are the MLP's own as long as the weights of a token's
    experts add up to one. Experts of a part of its width share its neurons out: E P / F times over, each time in a new
    random order, F / P experts of P neurons take all of them, and their outputs count F / P times. With equal weights
    the mixture of all experts, or of those of one sharing, is the MLP. (MoE-X reports that it starts from a trained
    dense model, not how neurons come to narrower experts.)

    Args:
        dense: the parameters of a `models.layers.MLP` without biases, of the experts' activation.
        config: the mixture; F / P must be a whole number that divides E.
        router: [D, E], the kernel of a learned router.
        key: of the orders; None: key 0.

    Raises:
        InputError: widths that cannot be shared out.
    """
    kernels = {name: as_kernel(layer["kernel"]).materialize() for name, layer in dense.items()}
    width, part, num = kernels["up"].shape[-1], config.expert.width, config.num_experts
    if width % part or num % (width // part):
        raise InputError(
            f"an MLP of width {width} cannot become {num} experts of width {part}: the experts that hold all of its "
            "neurons once must be a whole number, which divides the experts"
        )
    parts = width // part
    order = jnp.tile(jnp.arange(width), (num // parts, 1))
    if parts > 1:
        order = jax.random.permutation(jax.random.key(0) if key is None else key, order, axis=1, independent=True)
    order = order.reshape(num, part)
    shared = {
        f"experts_{name}": jnp.moveaxis(jnp.take(kernel, order, axis=1), 0, 1)
        for name, kernel in kernels.items()
        if name != "down"
    }
    shared["experts_down"] = parts * jnp.take(kernels["down"], order, axis=0)
    return shared if router is None else shared | {"router": {"kernel": router}}


def _activated(product: Callable[[jax.Array], jax.Array], experts: Experts, config: MLPConfig) -> jax.Array:
    """Returns act(gate x) * up x when gated, act(up x) when not, with `product` multiplying x by a weight."""
    activation = ACTIVATIONS[config.activation]
    if experts.gate is None:
        return activation(product(experts.up))
    return activation(product(experts.gate)) * product(experts.up)
