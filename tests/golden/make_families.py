"""Writes families.npz and families.json: logits of tiny random models of every family variant, computed by transformers
in float32.

Run as `python -m tests.golden.make_families` where torch and transformers are installed (`make parity` installs them).
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.support.tiny_models import CONFIGS, LENGTHS, tokens, weights

FOLDER = Path(__file__).parent


def torch_model(config: dict) -> torch.nn.Module:
    """Returns transformers' model for a config of `CONFIGS`, with the weights that follow from its tensors' names."""
    kind = dict(config)
    hf_config = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    hf_config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    state = {name: value for name, value in model.state_dict().items() if value.dtype == torch.float32}
    tied = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    shapes = {name: tuple(value.shape) for name, value in state.items() if name not in tied}
    made = {name: torch.from_numpy(value) for name, value in weights(shapes).items()}
    missing, unexpected = model.load_state_dict(made, strict=False)
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"{config['model_type']}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


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
        kept = {
            k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not model.config.tie_word_embeddings
        }
        shapes[name] = {k: tuple(v.shape) for k, v in kept.items()}
    np.savez_compressed(FOLDER / "families.npz", **arrays)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "shapes": shapes}
    (FOLDER / "families.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
