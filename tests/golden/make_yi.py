"""Writes yi.npz: logits of a tiny random model of Yi's shape, computed by transformers' Llama in float32.

Run as `python -m tests.golden.make_yi` where torch and transformers are installed.
"""

import numpy as np

from tests.golden.make_families import FOLDER, logits, torch_model
from tests.models.test_yi import CONFIG


def main() -> None:
    """Writes the file."""
    found = logits(torch_model({**CONFIG, "model_type": "llama"}))
    np.savez_compressed(FOLDER / "yi.npz", **{str(row): values for row, values in enumerate(found)})


if __name__ == "__main__":
    main()
