"""CoreInfer: the neurons that a prompt uses most, fixed for its whole continuation. Lossy.

Source: "CoreInfer: Accelerating Large Language Model Inference with Semantics-Inspired Adaptive Sparse Activation"
(2410.18311), stability-guided, after the released code. With a_t in R^F what enters the down projection at token t of a
prompt of M tokens, in each of the layers `first` to `last`

    limit = floor(alpha / M * sum_t #{n : a_t[n] > 0})          one limit for all tokens of the prompt
    f(n)  = #{t : a_t[n] is among the `limit` largest of a_t}    votes
    S     = the int(beta * F) neurons with the most votes

and decoding multiplies with these columns of gate and up and these rows of down alone. Prompts are read with the whole
weights, and all their tokens vote, the last included. Similarity-guided (for prompts too short to say much), S is that
of a cluster of texts (`neuron_clusters`, given as the option `clusters`).

Notes: votes that are equal are ranked by the sum of a over the prompt, then by the neuron's index; this also fills S
where fewer neurons have votes. What is larger is meant with its sign, as in the released code, though the sign of gated
activations says little: `choose="absolute"` asks |a|. A prompt of several chunks (`decoding.prefill.CHUNK`) has a limit
per chunk. The rows of a batch share one set, from their votes together, each row with its own limit: a set per row
would need weights per row. So a row's text depends on who shares its batch; decode prompts one by one where that
matters. Prompt lookup's drafts (`drafted`) are verified by the sparse model. Behind the chosen neurons of wide layers
stand neurons of zeros, up to a multiple of `WHOLE`: that changes no result, and a CPU reads such matrices faster.

Axis letters: B batch, T tokens read, D model width, F feed-forward width, N neurons chosen.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.autoregressive import DENSE
from decoding.method import Call, Method, Steps, Tailor
from decoding.prefill import Observer, Prompts, observed_prefill, pad_prompts
from decoding.sparse.neuron_clusters import Clusters, cluster_neurons
from decoding.sparse.steps import SparseOptions, policy_steps
from decoding.speculative.loop import TREE
from decoding.thresholds import highest, ordered
from models.config import DecoderConfig, MoEConfig
from models.decoder import Decoder
from models.errors import InputError, unknown_name
from models.kernels import PRECISION, Dense, select

Choice = Literal["core", "absolute", "magnitude", "random"]
WHOLE = 32
_CHOICES = ("core", "absolute", "magnitude", "random")


@dataclasses.dataclass(frozen=True)
class CoreInferOptions(SparseOptions):
    """Which neurons of which layers decode.

    Attributes:
        alpha: share of a token's positive activations that vote, above 0 to 1.
        beta: share of a layer's neurons that are kept, above 0 to 1.
        choose: what neurons are ranked by. `core`: votes. `absolute`: votes of |a| in place of a. `magnitude`: the sum
            of |a|. `random`: nothing that is in the prompt, as a control.
        first: the first layer with chosen neurons; None: 6 of 32, in proportion.
        last: the last one; None: 26 of 32, in proportion.
        clusters: whose neurons to take in place of the prompt's own; made with the other options the same, or they are
            refused.
    """

    alpha: float = 0.4
    beta: float = 0.4
    choose: Choice = "core"
    first: int | None = None
    last: int | None = None
    clusters: Clusters | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} must be a share, above 0 and at most 1; got {getattr(self, name)}")
        if self.choose not in _CHOICES:
            raise unknown_name("choose", self.choose, _CHOICES)


@struct.dataclass
class Votes:
    """What a layer's neurons have collected: count i32[F], total f32[F], the sum of their activations."""

    count: jax.Array
    total: jax.Array


def sparse_layers(config: DecoderConfig, options: CoreInferOptions) -> range:
    """Returns the layers with chosen neurons.

    Raises:
        InputError: layers that the model does not have, or a share of their neurons that keeps none.
    """
    num_layers = len(config.blocks)
    first = round(6 * num_layers / 32) if options.first is None else options.first
    last = 26 * num_layers // 32 if options.last is None else options.last
    if not 0 <= first <= last < num_layers:
        raise InputError(
            f"first and last must be layers of the model, 0 to {num_layers - 1}, in this order; got {first} and {last}"
        )
    if any(isinstance(config.blocks[layer].mlp, MoEConfig) for layer in range(first, last + 1)):
        raise InputError(
            f"core_infer chooses neurons of plain MLPs, and layers {first} to {last} of this {config.family} model are "
            "mixtures of experts: choose another method"
        )
    narrowest = min(config.blocks[layer].mlp.width for layer in range(first, last + 1))
    if int(options.beta * narrowest) < 1:
        raise InputError(
            f"beta {options.beta} keeps none of {narrowest} neurons: raise it to {math.ceil(1e6 / narrowest) / 1e6:g}"
        )
    layers = range(first, last + 1)
    if options.clusters is not None:
        check_clusters(config, options, layers)
    return layers


def check_clusters(config: DecoderConfig, options: CoreInferOptions, layers: range) -> None:
    """Raises InputError unless `options.clusters` were made for such a model, with these options."""
    clusters, wanted = options.clusters, _deciding(options)
    other = [f"{name} {clusters.made_with[name]}" for name in wanted if clusters.made_with[name] != wanted[name]]
    if other:
        own = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise InputError(
            f"clusters were made with {', '.join(other)}, which must be the method's own: give {own} to "
            "`neuron_clusters`, or the method what they were made with"
        )
    sizes = [(layer, int(options.beta * config.blocks[layer].mlp.width)) for layer in layers]
    found = [(layer, sets.shape[1]) for layer, sets in zip(clusters.layers, clusters.sets, strict=True)]
    if sizes != found:
        raise InputError(
            "clusters were made for another model, or with another first or last: wanted (layer, neurons) "
            f"{sizes}, got {found}"
        )


def _deciding(options: CoreInferOptions) -> dict[str, float | str]:
    """Returns the options that say which neurons are core neurons: clusters and prompts must share them."""
    return {"alpha": options.alpha, "beta": options.beta, "choose": options.choose}


def strongest(activations: jax.Array, limit: jax.Array) -> jax.Array:
    """Returns bool[B, T, F]: each token's `limit` largest activations; of equal ones those of lower index.

    Bisection: for limits that are not known when this is compiled, faster by far than sorting on a CPU.

    Args:
        activations: f32[B, T, F].
        limit: i32[B].
    """
    wanted, order = limit[:, None, None], ordered(activations)
    count = functools.partial(jnp.sum, axis=2, keepdims=True, dtype=jnp.int32)
    shape = *order.shape[:2], 1
    edge = highest(lambda value: count(order >= value) >= wanted, shape)
    place, tied, missing = jnp.arange(order.shape[2])[None, None, :], order == edge, wanted - count(order > edge)
    end = highest(lambda end: count(tied & (place < end)) <= missing, shape, 0, order.shape[2])
    return (order > edge) | (tied & (place < end))


def token_votes(inner: jax.Array, real: jax.Array, options: CoreInferOptions) -> Votes:
    """Returns the votes of tokens with activations `inner` [B, T, F]; `real`, bool[B, T], leaves out padding."""
    real, activations = real[:, :, None], inner.astype(jnp.float32)
    if options.choose in ("absolute", "magnitude"):
        activations = jnp.abs(activations)
    positive = ((activations > 0) & real).sum(axis=(1, 2)) / jnp.maximum(real.sum(axis=(1, 2)), 1)
    limit = jnp.floor(options.alpha * positive).astype(jnp.int32)
    weights = real.astype(jnp.float32)  # sums over tokens as products: a CPU adds up columns slowly
    count, total = (
        jnp.einsum("btx,btf->f", weights, values, precision=PRECISION)
        for values in (strongest(activations, limit).astype(jnp.float32), activations)
    )
    return Votes(count.astype(jnp.int32), total)


def vote_observer(config: DecoderConfig, options: CoreInferOptions) -> Observer:
    """Returns what collects a tuple of `Votes`, one for each layer of `sparse_layers`, over all rows and tokens."""
    layers = sparse_layers(config, options)

    def first(prompts: Prompts) -> tuple[Votes, ...]:
        widths = [config.blocks[layer].mlp.width for layer in layers]
        return tuple(Votes(jnp.zeros((width,), jnp.int32), jnp.zeros((width,), jnp.float32)) for width in widths)

    def add(seen: tuple[Votes, ...], inner: Sequence[jax.Array], real: jax.Array) -> tuple[Votes, ...]:
        new = [token_votes(inner[layer], real, options) for layer in layers]
        return tuple(jax.tree.map(jnp.add, old, more) for old, more in zip(seen, new, strict=True))

    return Observer(first, add)


def chosen_neurons(votes: Sequence[Votes], options: CoreInferOptions) -> tuple[jax.Array, ...]:
    """Returns i32[N] for each layer that has votes: the neurons that are kept, in ascending order."""
    keys = jax.random.split(jax.random.key(0), len(votes))

    def kept(votes: Votes, key: jax.Array) -> jax.Array:
        ranks = {
            "magnitude": (-votes.total,),
            "random": (jax.random.uniform(key, votes.total.shape),),
        }.get(options.choose, (-votes.total, -votes.count))  # the last one counts most
        return jnp.sort(jnp.lexsort(ranks)[: int(options.beta * len(votes.count))])

    return tuple(kept(layer, key) for layer, key in zip(votes, keys, strict=True))


def sliced(params: Any, layers: Sequence[int], chosen: Sequence[jax.Array]) -> dict[str, Any]:
    """Returns the entries of some layers' MLPs with the chosen neurons, i32[N] each, alone."""
    return {
        f"layers_{layer}": {"mlp": _sliced_mlp(params[f"layers_{layer}"]["mlp"], neurons)}
        for layer, neurons in zip(layers, chosen, strict=True)
    }


def _sliced_mlp(mlp: dict[str, Any], neurons: jax.Array) -> dict[str, Any]:
    parts: dict[str, dict[str, jax.Array | Dense]] = {}
    spare = -len(neurons) % WHOLE if len(neurons) >= 8 * WHOLE else 0
    for name in ("up", "gate"):
        if name in mlp:
            parts[name] = {"kernel": select(mlp[name]["kernel"], neurons, 1, spare)}
            if "bias" in mlp[name]:
                parts[name]["bias"] = jnp.pad(mlp[name]["bias"][neurons], (0, spare))
    return {**parts, "down": {"kernel": select(mlp["down"]["kernel"], neurons, 0, spare)}}


def neuron_clusters(
    model: Decoder,
    params: Any,
    texts: Sequence[Sequence[int]],
    options: CoreInferOptions | None = None,
    *,
    num: int | None = None,
    seed: int = 0,
) -> Clusters:
    """Returns clusters of texts like the prompts to come, for the option `clusters`.

    Args:
        model: the network.
        params: its parameters.
        texts: lists of token ids.
        options: those of the method, to which the clusters are then added; None: the defaults.
        num: clusters; 1: a set of neurons that is the same for all prompts. None: found from the texts, 4 to 10.
        seed: of the clustering.

    Raises:
        InputError: no texts, no clusters, or options that do not fit the model.
    """
    options = CoreInferOptions() if options is None else dataclasses.replace(options, clusters=None)
    if num is not None and num < 1:
        raise InputError(f"num must be at least 1 cluster, got {num}")
    layers = sparse_layers(model.config, options)
    rows = [pad_prompts([text], model.config.vocab_size) for text in texts]
    found = [_core_neurons(model, options, params, row) for row in rows]
    if not found:
        raise InputError("no texts: pass a list of lists of token ids")
    hot = []
    for index, layer in enumerate(layers):
        hot.append(np.zeros((len(found), model.config.blocks[layer].mlp.width), np.float32))
        for row, neurons in enumerate(found):
            hot[-1][row, np.asarray(neurons[index])] = 1.0
    guide = min(max(25 * len(model.config.blocks) // 32, layers[0]), layers[-1])
    sizes = [len(neurons) for neurons in found[0]]
    return cluster_neurons(layers, guide, hot, sizes, num, seed, _deciding(options))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _core_neurons(model: Decoder, options: CoreInferOptions, params: Any, prompts: Prompts) -> tuple[jax.Array, ...]:
    """Returns i32[N] for each sparse layer: the neurons that a batch of prompts would decode with."""
    observer = vote_observer(model.config, options)
    return chosen_neurons(
        observed_prefill(model, params, prompts, prompts.tokens.shape[1], observer=observer)[1], options
    )


def make_core_infer(model: Decoder, options: CoreInferOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Samples (greedily by default) with the core neurons of the prompts."""
    layers = sparse_layers(model.config, options)

    def kernels(params: Any, votes: tuple[Votes, ...], call: Call) -> dict[str, Any]:
        chosen = chosen_neurons(votes, options)
        if options.clusters is not None:
            nearest = options.clusters.nearest(chosen[layers.index(options.clusters.guide)])
            chosen = tuple(jnp.asarray(sets)[nearest] for sets in options.clusters.sets)
        return sliced(params, layers, chosen)

    steps = policy_steps(model, TREE if options.drafted else DENSE, options, stop_tokens)
    return steps._replace(tailor=Tailor(vote_observer(model.config, options), kernels))


CORE_INFER = Method("lossy", CoreInferOptions, make_core_infer, temperature=0.0, shared=True)
