"""A trained pair in one file: memory tokens, projector, and what training did to the two decoders.

The decoders themselves are not saved but where they were trained whole; the file names both, with hashes of their
content, and refuses others.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pydantic
from jax.experimental import multihost_utils

from finetune.adapters import ADAPTERS, AdapterConfig, make_adapter
from finetune.adapters.adapter import merge, rebase
from finetune.adapters.saved import Base
from models.decoder import Decoder
from models.dolphin import PARTS, Dolphin, DolphinConfig
from models.errors import InputError
from models.head_file import read_head, write_head

_KIND = "dolphin"
_MAIN = "experiments.train"
_FLAGS = "--config configs/train/dolphin_restoration.yaml"


class Bases(NamedTuple):
    """The decoders that a pair is made of, before training."""

    compressor: Base
    main: Base


def save_dolphin(
    path: Path, params: Any, bases: Bases, adapter: AdapterConfig | None, frozen: Any = None, trainable: Any = None
) -> None:
    """Writes a pair. Every process of a run must call this; the first one writes.

    Args:
        path: the file.
        params: the pair's parameters: all of them where the decoders were trained whole, else those of `PARTS`.
        bases: the decoders.
        adapter: what adapted them; None: they were trained whole.
        frozen: the adapter's frozen values.
        trainable: its trained values.

    Raises:
        InputError: the file cannot be written.
    """
    values = dict(params) if adapter is None else {name: params[name] for name in PARTS}
    if adapter is not None:
        values |= {"frozen": frozen, "trainable": trainable}
    if jax.process_count() > 1:
        values = multihost_utils.process_allgather(values, tiled=True)
    if jax.process_index() != 0:
        return
    facts = {"adapter": None if adapter is None else dataclasses.asdict(adapter), "bases": bases._asdict()}
    facts["bases"] = {name: base._asdict() for name, base in facts["bases"].items()}
    write_head(path, _KIND, values, {name: json.dumps(value) for name, value in facts.items()})


def load_dolphin(
    path: Path, bases: Bases, compressor: tuple[Decoder, Any], main: tuple[Decoder, Any]
) -> tuple[Dolphin, dict[str, Any]]:
    """Reads a pair and returns it with its parameters, what adapted the decoders merged into them.

    Args:
        path: a file of `save_dolphin`.
        bases: the decoders at hand.
        compressor: (model, parameters) of the first.
        main: of the second.

    Raises:
        InputError: no such file, a damaged one, or one for other decoders.
    """
    values, facts = read_head(path, _KIND, _MAIN, _FLAGS)
    try:
        about = {name: json.loads(facts[name]) for name in ("adapter", "bases")}
        belongs = Bases(**{name: Base(**base) for name, base in about["bases"].items()})
        memory = values["memory"].shape[0]
        config = None
        if about["adapter"] is not None:
            config = pydantic.TypeAdapter(ADAPTERS[about["adapter"]["type"]][0]).validate_python(about["adapter"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged, or of another version: {error}") from error
    for what, wanted, found in zip(Bases._fields, belongs, bases, strict=True):
        if wanted.content != found.content:
            raise InputError(
                f"{path} belongs to the {what} {wanted.name!r} (content {wanted.content[:12]}), not to {found.name!r} "
                f"(content {found.content[:12]}): load that model, or train a pair with this one"
            )
    model = Dolphin(DolphinConfig(compressor[0].config, main[0].config, memory))
    params = {"compressor": compressor[1], "main": main[1]}
    if config is None:
        return model, jax.tree.map(lambda new, old: new.astype(old.dtype), values, params | _parts(values))
    params |= _parts(values)
    adapter, trainable = make_adapter(config), values.get("trainable", {})
    frozen = {path: {} for path in trainable} | values.get("frozen", {})
    return model, merge(adapter, rebase(adapter, params, frozen), frozen, trainable)


def _parts(values: Any) -> dict[str, Any]:
    return {name: values[name] for name in PARTS}
