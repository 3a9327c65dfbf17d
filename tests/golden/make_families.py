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

from tests.support.tiny_models import CONFIGS, ENCODER_DECODERS, LENGTHS, targets, tokens, weights

FOLDER = Path(__file__).parent


def torch_model(config: dict) -> torch.nn.Module:
    """Returns transformers' model for a config of `tiny_models`, with the weights that follow from their names."""
    kind = dict(config)
    hf_config = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    auto = transformers.AutoModelForSeq2SeqLM if hf_config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        auto.from_config(hf_config, dtype=torch.float32).save_pretrained(folder)
        shapes = saved_shapes(folder)
        if not kind.get("tie_word_embeddings", True):  # T5's matrices are one until a file has both
            shapes.setdefault("lm_head.weight", (config["vocab_size"], hf_config.hidden_size))
        made = {name: torch.from_numpy(value) for name, value in weights(shapes).items()}
        save_file(made, f"{folder}/model.safetensors", {"format": "pt"})
        model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def saved_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a folder that `save_pretrained` wrote, by the names of published files."""
    with safe_open(Path(folder) / "model.safetensors", "numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def logits(model: torch.nn.Module) -> list[np.ndarray]:
    """Returns f32[length, V] for each row of the ragged batch, every row run alone; of encoder-decoders f32[16, V]."""
    rows = [torch.from_numpy(row[:length]).long()[None] for row, length in zip(tokens(), LENGTHS, strict=True)]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            written = torch.from_numpy(targets()).long()[:, None]
            return [
                model(row, decoder_input_ids=text).logits[0].numpy() for row, text in zip(rows, written, strict=True)
            ]
        return [model(row).logits[0].numpy() for row in rows]


def main() -> None:
    """Writes both files."""
    arrays, shapes = {}, {}
    for name, config in (CONFIGS | ENCODER_DECODERS).items():
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
