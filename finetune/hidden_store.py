"""A model's residual streams over texts, in memory-mapped files, so that training a head never runs the model.

folder/about.json    {"format": 1, "base": {...}, "texts": SHA-256, "layers": [30], "shape": [tokens, width]}
folder/30.npy        f16[tokens, width], the stream before layer 30, all texts one behind the other

Streams are stored before any norm: what the unembedding reads is one norm away, and is cheap to make again. Reading a
stream from a file takes a hundredth of the time of making it: an update of a small head would otherwise be mostly the
model's own forward pass.

Axis letters: B rows of a pass, T tokens of a row, N tokens of all texts, D model width.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding.prefill import bucket_length
from finetune.adapters.saved import Base
from finetune.rows import Rows
from models.decoder import Decoder, next_positions
from models.errors import InputError
from models.weights.safetensors import read_json
from models.weights.whole import whole_folder

ABOUT = "about.json"
_FORMAT = 1
_AGAIN = "run python -m experiments.generate again"


def store(
    folder: Path,
    model: Decoder,
    params: Any,
    base: Base,
    rows: Rows,
    texts: str,
    layers: Sequence[int],
    *,
    batch_size: int = 8,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the streams of texts; the folder appears complete or not at all, and replaces an older one.

    Args:
        folder: where to.
        model: the model that wrote the texts.
        params: its parameters.
        base: what identifies it.
        rows: the texts.
        texts: their fingerprint (`finetune.self_texts`).
        layers: which streams, by the index of the layer they enter; the number of layers for the last one.
        batch_size: texts of a pass.
        report: called with the texts done after each pass.

    Raises:
        InputError: no such layer, a value beyond float16's range, or a folder that cannot be written.
    """
    depth = model.config.num_layers
    wrong = [layer for layer in layers if not 0 <= layer <= depth]
    if wrong:
        raise InputError(f"the model has streams 0 to {depth}, not {wrong[0]}")

    @jax.jit
    def streams(params, tokens):
        def forward(module, tokens):
            positions = next_positions(tokens, None)
            return module.layers(module.embed(tokens, positions), positions, collect=tuple(layers))[1]

        return jax.tree.map(lambda x: x.astype(jnp.float16), model.apply({"params": params}, tokens, method=forward))

    shape = (len(rows.tokens), model.config.width)
    order = np.argsort(rows.lengths, kind="stable")
    with whole_folder(folder, mark=ABOUT) as staging:
        files = {
            layer: np.lib.format.open_memmap(staging / f"{layer}.npy", mode="w+", dtype=np.float16, shape=shape)
            for layer in layers
        }
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            width = bucket_length(int(rows.lengths[chosen].max()))
            tokens = np.zeros((batch_size, width), np.int32)
            for place, row in enumerate(chosen):
                tokens[place, : rows.lengths[row]] = rows.tokens[rows.starts[row] : rows.starts[row + 1]]
            found = jax.device_get(streams(params, tokens))
            for layer, file in files.items():
                for place, row in enumerate(chosen):
                    values = found[layer][place, : rows.lengths[row]]
                    if not np.isfinite(values).all():
                        raise InputError(f"the stream before layer {layer} leaves the range of float16: store another")
                    file[rows.starts[row] : rows.starts[row + 1]] = values
            report(first + len(chosen))
        for file in files.values():
            file.flush()
        about = {"format": _FORMAT, "base": base._asdict(), "texts": texts, "layers": list(layers), "shape": shape}
        (staging / ABOUT).write_text(json.dumps(about), encoding="utf-8")


def stored(folder: Path, base: Base, texts: str) -> tuple[int, ...]:
    """Returns which streams of these texts a folder has; none where there is no folder.

    Raises:
        InputError: as `open_streams` does.
    """
    return () if not folder.exists() else tuple(_about(folder, base, texts)["layers"])


def open_streams(folder: Path, base: Base, texts: str, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Returns {layer: f16[N, D]}, memory-mapped.

    Args:
        folder: what `store` wrote.
        base: the model that must have made them.
        texts: the fingerprint of the texts that they must be of.
        layers: which streams.

    Raises:
        InputError: no such folder, one of another model or of other texts, one that lacks a stream, or a file that is
            cut short.
    """
    about = _about(folder, base, texts)
    missing = [layer for layer in layers if layer not in about["layers"]]
    if missing:
        raise InputError(
            f"{folder} has the streams before layers {about['layers']}, not before {missing[0]}: {_AGAIN} with "
            f"--layers {' '.join(map(str, sorted({*about['layers'], *layers})))}"
        )
    return {layer: _open(folder / f"{layer}.npy", tuple(about["shape"])) for layer in layers}


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing, cut short or damaged ({error}): {_AGAIN}") from error
    if values.shape != shape or values.dtype != np.float16:
        raise InputError(f"{path} has {values.dtype}{values.shape}, wanted float16{shape}: {_AGAIN}")
    return values


def _about(folder: Path, base: Base, texts: str) -> dict[str, Any]:
    if not (folder / ABOUT).is_file():
        raise InputError(f"{folder} holds no hidden states: there is no {ABOUT} in it; {_AGAIN}")
    about = read_json(folder / ABOUT)
    if about.get("format") != _FORMAT:
        raise InputError(f"{folder / ABOUT} has format {about.get('format')!r}; this version reads {_FORMAT}")
    made_by = Base(**about["base"])
    if made_by.content != base.content:
        raise InputError(
            f"the hidden states in {folder} are those of {made_by.name!r} (content {made_by.content[:12]}), not of "
            f"{base.name!r} (content {base.content[:12]}): {_AGAIN}"
        )
    if about["texts"] != texts:
        raise InputError(f"the hidden states in {folder} are of other texts than are there now: {_AGAIN}")
    return about
