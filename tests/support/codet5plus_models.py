"""Tiny models of CodeT5+'s shapes, with weights that follow from names: folders, and a joined model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.joined import JoinConfig, Part, join
from models.weights.load import load_model
from tests.support.tiny_models import CONFIGS, ENCODER_DECODERS, LENGTHS, weights, write_checkpoint

WIDTH, GATE = 6, 0.7
HEADS = {"proj.weight": (WIDTH, 32), "proj.bias": (WIDTH,), "itm_head.weight": (2, 32), "itm_head.bias": (2,)}
SMALL = {**ENCODER_DECODERS["t5"], "d_model": 20}
CROSS = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32)}


def written() -> tuple[np.ndarray, np.ndarray]:
    """Returns texts that are matched: i32[3, 12], and how much of each counts."""
    return np.random.default_rng(2).integers(1, 61, (len(LENGTHS), 12), dtype=np.int32), np.array([12, 7, 3], np.int32)


def write_embedding(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes the encoder alone, of which `shapes` are a T5's: the published file has it without the decoder."""
    kept = {name: shape for name, shape in shapes.items() if not name.startswith("decoder.")}
    heads = {name: shape for name, shape in HEADS.items() if name.startswith("proj")}
    write_checkpoint(
        folder, {**ENCODER_DECODERS["t5"], "model_type": "codet5p_embedding", "embed_dim": WIDTH}, kept | heads
    )


def write_bimodal(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a T5 of these shapes with both heads."""
    config = {**ENCODER_DECODERS["t5"], "model_type": "codet5p_bimodal", "embed_dim": WIDTH}
    write_checkpoint(folder, config, shapes | HEADS)


def cross_weights() -> dict[str, np.ndarray]:
    """Returns kernels [in, out] and biases of the joined model's fresh parameters, by name."""
    kernels = {f"joined.{name}.kernel": shape for name, shape in (CROSS | {"bridge": (20, 32)}).items()}
    biases = {f"joined.{name}.bias": (32,) for name in (*CROSS, "bridge")}
    return weights({**kernels, **biases, "joined.norm.scale": (32,), "joined.norm.bias": (32,)})


def joined(folder: Path, shapes: dict[str, dict[str, tuple[int, ...]]], gate: float | None = GATE) -> Any:
    """Returns (model, params, the decoder that it is made of, its parameters): a narrower T5 encoder before GPT-2.

    Args:
        folder: where the two are written to.
        shapes: of "gpt2" and of "t5_small".
        gate: None leaves every fresh parameter as `join` makes it.
    """
    write_checkpoint(folder / "gpt2", CONFIGS["gpt2"], shapes["gpt2"])
    write_checkpoint(folder / "t5", SMALL, shapes["t5_small"])
    decoder, reader = load_model(folder / "gpt2"), load_model(folder / "t5")
    read = {**reader.params["encoder"], "embedding": reader.params["decoder"]["embedding"]}
    model, params = join(
        Part(reader.model.config.encoder, read),
        Part(decoder.model.config, decoder.params),
        JoinConfig("t5", cross_layers=1, start_token=3),
        jax.random.key(0),
    )
    if gate is not None:
        given = {name: jnp.asarray(value) for name, value in cross_weights().items()}
        last = params["decoder"]["layers_2"]
        parts = {"kernel": "kernel", "bias": "bias"}
        last["cross"] = {x: {kind: given[f"joined.{x}.{kind}"] for kind in parts} for x in CROSS}
        last["cross_norm"] = {kind: given[f"joined.norm.{kind}"] for kind in ("scale", "bias")}
        last["cross_gate"] = jnp.float32(gate)
        params["bridge"] = {kind: given[f"joined.bridge.{kind}"] for kind in parts}
    return model, params, decoder.model, decoder.params
