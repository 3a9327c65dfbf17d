"""Networks and weights. Knows nothing of decoding or training.

The public names are imported when they are first used, so that a program's `--help` need not wait for JAX.
"""

import importlib
from typing import Any

_PUBLIC = {
    "Decoder": "models.decoder",
    "DecoderConfig": "models.config",
    "InputError": "models.errors",
    "LoadedModel": "models.weights.load",
    "load_model": "models.weights.load",
    "save_model": "models.weights.orbax",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
