"""Hidden Transfer: pseudo hidden states of tokens to come, put in at a middle layer and run through the layers above.

Source: "Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration" (2404.12022; FIRP,
2410.20488, is its authors' follow-up). Behind text x_1..x_n the stream h of x_n before layer l becomes K streams, the
k-th of them a guess of what stands there at x_{n+k}. They run through layers l.. at their own positions, where they
attend to the text and to each other, and the last layer's output of the k-th guesses x_{n+k+1}. Only the transfer is
trained.

    transfer   h_k = h + A_k norm(h) + b_k, A and b zero at first; norm is that of the layer that it enters

Deviations. Only the paper's abstract and summaries could be read, so that constants are ours. The paper maps h by one
matrix; here it acts on h as the next layer reads it, since a few entries of the plain stream are a hundred times
larger than the rest. The paper guesses and verifies in one pass, in which every row of the tree has pseudo rows of its
own; here the K pseudo rows of the row that was kept are run alone before the next pass (the same guesses, from
N + K rows of the upper layers in place of N (1 + K)).

Axis letters: B batch, T tokens of a row, K offsets, D model width.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from decoding.method import Method, Steps, WithDraft
from decoding.speculative.draft_head import HeadKind, HeadOptions, Reading, make_parallel, normed
from decoding.speculative.drafter import Round
from decoding.speculative.groups import Groups, behind_attend, group_attend
from models.attention import TreeRows
from models.cache import KVCache
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import PRECISION
from models.layers import Norm


@dataclasses.dataclass(frozen=True)
class HiddenTransferConfig:
    """Where pseudo states are put in.

    Attributes:
        offsets: K.
        layers: the layer that each offset's stream enters; one number stands for all of them. The number of layers
            itself: behind the last one, where nothing attends to anything.
        interact: whether a pseudo state sees those of the offsets before it.
    """

    type: Literal["hidden_transfer"] = "hidden_transfer"
    offsets: int = 3
    layers: tuple[int, ...] = (20,)
    interact: bool = True

    def __post_init__(self) -> None:
        if self.offsets < 1:
            raise InputError(f"offsets must be at least 1, got {self.offsets}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.layers) not in (1, self.offsets) or min(self.layers, default=0) < 0:
            raise InputError(f"layers must be one layer, or one for each of {self.offsets} offsets; got {self.layers}")

    @property
    def entered(self) -> tuple[int, ...]:
        """The layer of each offset."""
        return self.layers * self.offsets if len(self.layers) == 1 else self.layers


@dataclasses.dataclass(frozen=True)
class HiddenTransferOptions(HeadOptions):
    """Head and tree."""

    head: Any = HiddenTransferConfig()


def transfer(model: Decoder, params: Any, values: Any, offset: int, layer: int, h: jax.Array) -> jax.Array:
    """Returns the pseudo stream of an offset before a layer, [..., D], of the text's own, [..., D]."""
    if layer == model.config.num_layers:
        read = model.apply({"params": params}, h, method="normed")
    else:
        read = Norm(model.config.norm).apply({"params": params[f"layers_{layer}"]["attention_norm"]}, h)
    kernel, bias = (values[name][offset] for name in ("kernel", "bias"))
    moved = jnp.matmul(read.astype(jnp.float32), kernel, precision=PRECISION)
    return h + (moved + bias.reshape(*(1,) * (h.ndim - 1), -1)).astype(h.dtype)


def visible_groups(config: HiddenTransferConfig, start: int) -> np.ndarray:
    """Returns bool[K, K]: which pseudo states (the second axis) another one sees from layer `start` on."""
    entered = np.array(config.entered) <= start
    before = np.tri(config.offsets, dtype=bool) if config.interact else np.eye(config.offsets, dtype=bool)
    return before & entered[None, :] | np.eye(config.offsets, dtype=bool)


def stages(config: HiddenTransferConfig, num_layers: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of the layers between one entry and the next."""
    starts = sorted(set(config.entered))
    return list(zip(starts, [*starts[1:], num_layers], strict=True))


def pseudo_streams(
    config: HiddenTransferConfig, model: Decoder, params: Any, reading: Reading, enter: Any
) -> jax.Array:
    """Returns [B, T, K, D]: the pseudo states of every token of packed texts behind the last layer.

    Args:
        config: where they enter.
        model: the target.
        params: its parameters.
        reading: texts with their streams.
        enter: (offset, layer, h [B, T, D]) -> [B, T, D], what enters.
    """
    batch, length = reading.tokens.shape
    ahead = jnp.arange(1, config.offsets + 1)[None, None, :]
    positions = (reading.positions[..., None] + ahead).reshape(batch, -1)
    positions = jnp.concatenate([reading.positions, positions], axis=1)
    text = reading.hidden[min(config.entered)]
    pseudo = jnp.zeros((batch, length, config.offsets, text.shape[-1]), text.dtype)
    for start, stop in stages(config, model.config.num_layers):
        for offset, layer in enumerate(config.entered):
            if layer == start:
                pseudo = pseudo.at[:, :, offset].set(enter(offset, layer, text))
        groups = Groups(reading.positions, reading.segments, visible_groups(config, start))
        x = jnp.concatenate([text, pseudo.reshape(batch, -1, text.shape[-1])], axis=1)

        def run(module: Decoder, x: jax.Array, groups=groups, start=start, stop=stop) -> jax.Array:
            return module.layers(x, positions, attend=group_attend, ctx=groups, start=start, stop=stop)[0]

        x = model.apply({"params": params}, x, method=run)
        text, pseudo = jax.lax.stop_gradient(x[:, :length]), x[:, length:].reshape(pseudo.shape)
    return pseudo


def cached_streams(
    config: HiddenTransferConfig, model: Decoder, params: Any, cache: KVCache, depth: int, enter: Any
) -> jax.Array:
    """Returns [B, depth, D]: the pseudo states of the newest token of a cache; `enter` is (offset, layer) -> [B, D]."""
    steps = jnp.arange(depth)[None, :]
    positions = cache.length[:, None] + steps
    pseudo = None
    for start, stop in stages(config, model.config.num_layers):
        for offset, layer in enumerate(config.entered[:depth]):
            if layer == start:
                entering = enter(offset, layer)
                pseudo = (
                    jnp.zeros((len(entering), depth, entering.shape[-1]), entering.dtype) if pseudo is None else pseudo
                )
                pseudo = pseudo.at[:, offset].set(entering)
        if pseudo is None:
            continue
        rows = TreeRows(jnp.asarray(visible_groups(config, start)[None, :depth, :depth]), steps)

        def run(module: Decoder, x: jax.Array, rows=rows, start=start, stop=stop) -> jax.Array:
            return module.layers(x, positions, cache, behind_attend, rows, start=start, stop=stop)[0]

        pseudo = model.apply({"params": params}, pseudo, method=run)
    return pseudo


def _streams(config: HiddenTransferConfig, model: Decoder) -> tuple[int, ...]:
    if max(config.layers) > model.config.num_layers:
        raise InputError(
            f"the model has {model.config.num_layers} layers: nothing can enter layer {max(config.layers)}"
        )
    return tuple(sorted(set(config.entered)))


def _init(config: HiddenTransferConfig, model: Decoder, params: Any, key: jax.Array) -> Any:
    shape = (config.offsets, model.config.width)
    return {"kernel": jnp.zeros((*shape, model.config.width), jnp.float32), "bias": jnp.zeros(shape, jnp.float32)}


def _guesses(config: HiddenTransferConfig, model: Decoder, params: Any, values: Any, reading: Reading) -> jax.Array:
    def enter(offset: int, layer: int, h: jax.Array) -> jax.Array:
        return transfer(model, params, values, offset, layer, h)

    return normed(model, params, pseudo_streams(config, model, params, reading, enter))


HIDDEN_TRANSFER_HEAD = HeadKind(HiddenTransferConfig, _streams, _init, _guesses)


def make_hidden_transfer(model: Decoder, options: HiddenTransferOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts the calibrated tree of `options.nodes` guesses."""
    config = options.head

    def guess(params: WithDraft, kept: dict[int, jax.Array], round_: Round, depth: int) -> jax.Array:
        def enter(offset: int, layer: int) -> jax.Array:
            return transfer(model, params.target, params.draft, offset, layer, kept[layer])

        x = cached_streams(config, model, params.target, round_.cache, depth, enter)
        return normed(model, params.target, x)

    return make_parallel(HIDDEN_TRANSFER_HEAD, model, options, stop_tokens, guess)


HIDDEN_TRANSFER = Method("exact", HiddenTransferOptions, make_hidden_transfer, temperature=0.0, head=True)
