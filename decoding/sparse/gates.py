"""Which heads need the whole context: gates, and the split of heads that they give.

A gate is a number per layer and key/value head; a high one says that the head needs what stands between the first
tokens and the last. LServe (2502.14866) takes them from training (DuoAttention); `head_gates` measures them, as the
share of attention that falls there.
"""

from typing import Any

import jax
import jax.numpy as jnp

from decoding.sparse.streaming import check_window
from models.attention import Attend, attention_scores, dense_attend, visible_softmax
from models.config import DecoderConfig
from models.decoder import Decoder
from models.errors import InputError

Gates = tuple[tuple[float, ...], ...]


def retrieval_heads(config: DecoderConfig, gates: Gates | None, streaming: float) -> tuple[tuple[int, ...], ...]:
    """Returns, for each layer, the key/value heads that read pages; the others stream.

    Of gates that are equal those of earlier layers and heads stream first.

    Raises:
        InputError: gates that do not fit the model.
    """
    layers = [block.attention for block in config.blocks]
    counts = tuple(layer.num_kv_heads for layer in layers)
    if gates is None:
        return tuple(tuple(range(count)) for count in counts)
    if tuple(len(layer) for layer in gates) != counts:
        raise InputError(
            f"gates must have one number per layer and key/value head: {len(counts)} layers of {counts[0]} for this "
            f"model; got {[len(layer) for layer in gates]}"
        )
    places = [(i, head) for i, layer in enumerate(layers) if layer.window is None for head in range(counts[i])]
    ranked = sorted(places, key=lambda place: gates[place[0]][place[1]])
    kept = set(ranked[round(streaming * len(places)) :])
    return tuple(tuple(head for head in range(count) if (i, head) in kept) for i, count in enumerate(counts))


def head_gates(model: Decoder, params: Any, tokens: jax.Array, *, sink: int = 128, local: int = 256) -> Gates:
    """Returns gates for `LServeOptions`: per layer and key/value head, the mean share of attention on what a streaming
    head would not see. Layers with a sliding window get zeros.

    Args:
        model: the network.
        params: its parameters.
        tokens: i32[B, T], whole texts of one length, longer than sink and window; texts that call for something far
            back (a passkey, a table) tell heads apart best.
        sink: first tokens that a streaming head sees.
        local: last tokens that it sees.

    Raises:
        InputError: texts in which a streaming head sees everything.
    """
    check_window(sink, local)
    if tokens.shape[1] <= sink + local:
        raise InputError(f"texts of {tokens.shape[1]} tokens have nothing between sink {sink} and window {local}")
    attend = _measuring(sink, local)
    shares = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, attend=attend, ctx=()).aux)
    shares = shares(params, tokens)
    return tuple(tuple(float(share) for share in layer) for layer in shares)


def _measuring(sink: int, local: int) -> Attend:
    """Returns dense attention that adds f32[K] shares per layer to its context, a tuple."""

    def attend(q, k, v, cache, ctx, *, config, layer):
        shares = jnp.zeros((config.num_kv_heads,), jnp.float32)
        if config.window is None:
            place = jnp.arange(q.shape[1])
            behind = place[:, None] - place[None, :]
            weights = visible_softmax(
                attention_scores(q, jnp.swapaxes(k, 1, 2), config), (behind >= 0)[None, None, None]
            )
            lost = (behind >= local) & (place >= sink)[None, :]
            shares = jnp.where(lost[None, None, None], weights, 0.0).sum(axis=4).mean(axis=(0, 2, 3))
        return *dense_attend(q, k, v, cache, None, config=config, layer=layer)[:2], (*ctx, shares)

    return attend
