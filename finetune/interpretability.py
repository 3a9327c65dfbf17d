"""How well single neurons stand for what is known of a text: MoE-X's measures (2503.07639), on any hidden vector.

A feature is one entry of what enters a layer's down projection: a neuron of an MLP or, of a mixture of experts, of the
one wide MLP that it is, with zeros where an expert is not chosen. A property is something that holds or does not at a
token: a disc of the player to move lies on d3, the text is told of a woman. Coverage and reconstruction are those of
Karvonen et al. (2408.00113) as MoE-X takes them over.

Two choices of our own. Reconstruction counts right and wrong squares over all boards together. And for texts, where
MoE-X lets a language model explain a feature from its strongest tokens and a second one find tokens by the explanation,
the explanation here is the known property that fits best: of what a language model could say, only as much as that.

Axis letters: N tokens, M features, P properties, E experts, B rows, T tokens of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.config import DecoderConfig, MoEConfig
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import PRECISION
from models.moe import ROUTING

LEVELS = tuple(tenth / 10 for tenth in range(11))  # shares of a feature's greatest value
PRECISION_WANTED, FEWEST_FIRINGS = 0.95, 10  # of a feature, to stand for a property
_BATCH = 32  # rows that are read at once


class Codes(NamedTuple):
    """What a layer has for each token.

    Attributes:
        features: f32[N, M].
        scores: f32[N, E], the router's; None: there is none.
        fired: f32[N, E], how many neurons of an expert have an input above zero, whether it is chosen or not; None.
    """

    features: np.ndarray
    scores: np.ndarray | None = None
    fired: np.ndarray | None = None


class Found(NamedTuple):
    """A figure, and the level at which it is the best."""

    value: float
    level: float


def hidden_codes(model: Decoder, params: Any, texts: Sequence[Sequence[int]], layer: int, first: int = 0) -> Codes:
    """Returns what a layer has for the tokens of texts, one text behind the other.

    Args:
        model: the network.
        params: its parameters.
        texts: tokens of each.
        layer: 0 to L - 1.
        first: tokens at the beginning of every text that are left out.

    Raises:
        InputError: no such layer.
    """
    if not 0 <= layer < model.config.num_layers:
        raise InputError(f"layer must be 0 to {model.config.num_layers - 1}, got {layer}")
    longest = max(map(len, texts))
    run = jax.jit(lambda params, tokens: _codes(model.config, params, tokens, layer))
    found = []
    for start in range(0, len(texts), _BATCH):
        rows = texts[start : start + _BATCH]
        tokens = np.zeros((_BATCH, longest), np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
        values = [np.asarray(value) for value in run(params, tokens)]
        found += [[value[place, first : len(row)] for value in values] for place, row in enumerate(rows)]
    return Codes(*(np.concatenate(values) for values in zip(*found, strict=True)))


def _codes(config: DecoderConfig, params: Any, tokens: jax.Array, layer: int) -> tuple[jax.Array, ...]:
    """Returns the values of `Codes`, [B, T, ...] each; of a layer without experts the features alone."""
    blocks = tuple(
        dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, form="dense"))
        if isinstance(block.mlp, MoEConfig)
        else block
        for block in config.blocks
    )
    model, name = Decoder(dataclasses.replace(config, blocks=blocks)), f"layers_{layer}"
    _, left = model.apply(
        {"params": params},
        tokens,
        mutable=["intermediates", ROUTING],
        capture_intermediates=lambda module, method: module.name == "mlp_norm",
    )
    block = left["intermediates"][name]
    features = block["mlp"]["inner"][0].astype(jnp.float32)
    if not isinstance(config.blocks[layer].mlp, MoEConfig):
        return (features,)
    kernel = params[name]["mlp"]["experts_up"]
    inputs = jnp.einsum("btd,edf->btef", block["mlp_norm"]["__call__"][0], kernel, precision=PRECISION)
    return features, left[ROUTING][name]["mlp"]["scores"][0], jnp.sum(inputs > 0, axis=-1).astype(jnp.float32)


def coverage(features: np.ndarray, properties: np.ndarray, levels: Sequence[float] = LEVELS) -> Found:
    """Returns the mean over properties of the best F1 that any one feature has, at the best level for all of them.

    At a level t a feature is on where it is above t times its greatest value. Properties that never hold are left out.

    Args:
        features: f32[N, M].
        properties: bool[N, P].
        levels: from 0 up to 1.

    Raises:
        InputError: no property ever holds.
    """
    properties = properties[:, properties.any(axis=0)]
    if not properties.shape[1]:
        raise InputError("none of the properties holds at any token, so none can be found")
    greatest, best = features.max(axis=0), Found(0.0, 0.0)
    for level in levels:
        both, fired, held = _counts(_on(features, greatest, level), properties)
        f1 = 2 * both / np.maximum(fired[:, None] + held[None], 1)
        best = max(best, Found(float(f1.max(axis=0).mean()), level), key=lambda found: found.value)
    return best


class Reconstruction(NamedTuple):
    """Properties that are told from features: F1 over all, the level, and the share of squares of which two are told.

    `conflicts` is None where properties exclude no others.
    """

    f1: float
    level: float
    conflicts: float | None


def reconstruction(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    kinds: int = 1,
    levels: Sequence[float] = LEVELS,
) -> Reconstruction:
    """Returns how well properties are told by features that hardly ever fire without them, at the best level.

    A feature stands for every property that holds in 95 % of its firings, of which there must be 10, on `train`. On
    `test` a property is said to hold where any of its features is on.

    Args:
        train: features f32[N, M] and properties bool[N, P].
        test: the same of other texts; a feature's greatest value is that on `train`.
        kinds: how many properties in P exclude each other: p, p + P / kinds and so on (the owners of a square).
        levels: see `coverage`.
    """
    greatest, best = train[0].max(axis=0), Reconstruction(0.0, 0.0, 0.0 if kinds > 1 else None)
    for level in levels:
        both, fired, _ = _counts(_on(train[0], greatest, level), train[1])
        stands = (fired[:, None] >= FEWEST_FIRINGS) & (both >= PRECISION_WANTED * fired[:, None])
        told = _on(test[0], greatest, level) @ stands.astype(np.float32) > 0
        right = np.sum(told & test[1])
        f1 = float(2 * right / max(told.sum() + test[1].sum(), 1))
        twice = float((told.reshape(len(told), kinds, -1).sum(axis=1) > 1).mean()) if kinds > 1 else None
        best = max(best, Reconstruction(f1, level, twice), key=lambda found: found.f1)
    return best


def _on(features: np.ndarray, greatest: np.ndarray, level: float) -> np.ndarray:
    """Returns f32[N, M]: 1 where a feature is above a level of its greatest value; one that never fires is never on."""
    return ((features > level * greatest[None]) & (greatest > 0)[None]).astype(np.float32)


def _counts(on: np.ndarray, properties: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns how often both hold, [M, P], each feature is on, [M], and each property holds, [P]."""
    return on.T @ properties.astype(np.float32), on.sum(axis=0), properties.sum(axis=0).astype(np.float32)


class Detection(NamedTuple):
    """Mean accuracy of finding a feature's tokens by its explanation (0.5: by chance), its error, features asked."""

    accuracy: float
    error: float
    features: int


def detection(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int = 0,
    features: int = 1000,
    per_decile: int = 10,
) -> Detection:
    """Returns how well the property that explains a feature finds the tokens of other texts where it fires.

    A feature is explained by the property with the best F1 for its firings on `train`. On `test` it is asked of tokens
    where the feature fires, as many from each tenth of its strengths, and as many where it does not. Features that fire
    nowhere on `train`, or of which there are too few tokens of either kind, are not asked; if none is, the accuracy is
    that of chance.

    Args:
        train: features f32[N, M] and properties bool[N, P].
        test: the same of other texts.
        seed: of the features and tokens that are drawn.
        features: at most.
        per_decile: tokens of each tenth.
    """
    rng = np.random.default_rng(seed)
    both, fired, held = _counts((train[0] > 0).astype(np.float32), train[1])
    explanation = np.argmax(2 * both / np.maximum(fired[:, None] + held[None], 1), axis=1)
    firing, wanted = (test[0] > 0).sum(axis=0), 10 * per_decile
    able = np.flatnonzero((fired > 0) & (firing >= wanted) & (len(test[0]) - firing >= wanted))
    if not len(able):
        return Detection(0.5, 0.0, 0)
    shares = []
    for feature in rng.permutation(able)[:features]:
        strengths, holds = test[0][:, feature], test[1][:, explanation[feature]]
        order = np.argsort(strengths, kind="stable")
        firings = order[-firing[feature] :]
        found = [rng.choice(tenth, per_decile, replace=False) for tenth in np.array_split(firings, 10)]
        rests = rng.choice(order[: -firing[feature]], wanted, replace=False)
        shares.append((holds[np.concatenate(found)].mean() + 1 - holds[rests].mean()) / 2)
    return Detection(float(np.mean(shares)), float(np.std(shares) / len(shares) ** 0.5), len(shares))


def sparsity(codes: Codes, active: int) -> dict[str, float]:
    """Returns how many features are at work, and what a router makes of it.

    Args:
        codes: of a layer.
        active: K, the experts that a token goes to; not read where there are none.

    Returns:
        {"l0": features other than zero at a token, on average, "dead": share of features that are never above zero;
        with experts "score_vs_fired": correlation of an expert's score with how many of its neurons fire (nan where
        either never changes), "load_least", "load_most": the share of all choices that an expert gets}.
    """
    found = {
        "l0": float((codes.features != 0).sum(axis=1).mean()),
        "dead": float((codes.features.max(axis=0) <= 0).mean()),
    }
    if codes.scores is None or codes.fired is None:
        return found
    with np.errstate(invalid="ignore", divide="ignore"):
        related = np.corrcoef(codes.scores.ravel(), codes.fired.ravel())[0, 1]
    chosen = np.argsort(-codes.scores, axis=1, kind="stable")[:, :active]
    load = np.bincount(chosen.ravel(), minlength=codes.scores.shape[1]) / chosen.size
    return found | {
        "score_vs_fired": float(related),
        "load_least": float(load.min()),
        "load_most": float(load.max()),
    }
