"""Writes families.npz and families.json: logits of tiny random models of every family variant, computed by transformers
in float32.

Run as `python -m tests.golden.make_families` where torch and transformers are installed (`make parity` installs them).
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.tiny_models import CONFIGS, LENGTHS, tokens, weights

FOLDER = Path(__file__).parent


def torch_model(config: dict) -> torch.nn.Module:
    """Returns transformers' model for a config of `CONFIGS`, with the weights that follow from its tensors' names."""
    kind = dict(config)
    hf_config = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).save_pretrained(folder)
        made = {name: torch.from_numpy(value) for name, value in weights(saved_shapes(folder)).items()}
        save_file(made, f"{folder}/model.safetensors", {"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


def saved_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a folder that `save_pretrained` wrote, by the names of published files."""
    with safe_open(Path(folder) / "model.safetensors", "numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def logits(model: torch.nn.Module) -> list[np.ndarray]:
    """Returns f32[length, V] for each row of the ragged batch, every row run alone."""
    with torch.no_grad():
        rows = [torch.from_numpy(row[:length]).long()[None] for row, length in zip(tokens(), LENGTHS, strict=True)]
        return [model(row).logits[0].numpy() for row in rows]


def main() -> None:
    """Writes both files."""
    arrays, shapes = {}, {}
    for name, config in CONFIGS.items():
        model = torch_model(config)
        arrays |= {f"{name}.{row}": values for row, values in enumerate(logits(model))}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            shapes[name] = saved_shapes(folder)
    np.savez_compressed(FOLDER / "families.npz", **arrays)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "shapes": shapes}
    (FOLDER / "families.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
