"""Writes search.json: texts of beam search, diverse beam search and contrastive search by transformers, in float32.

transformers 4.55.4 is the last release with group beam search and contrastive search inside the package, so this needs
an environment of its own: `pip install transformers==4.55.4 torch==2.13.0 gguf accelerate` (which brings tokenizers
0.21 and a huggingface-hub below 1), then `python -m tests.golden.make_search SMOLLM2.gguf` with the default model's
file. The tiny model is `llama` of `tests.support.tiny_models`; every prompt runs alone.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.support.tiny_models import CONFIGS, weights

OUT = Path(__file__).with_name("search.json")
NEW_TOKENS = 12
LENGTHS = (3, 5, 9, 1, 7, 12)
PROMPTS = [np.random.default_rng(100 + length).integers(1, 61, length).tolist() for length in LENGTHS]
STOPS = (17, 29)
# What is static of each program (stop tokens among it), and the settings that vary in it.
BEAM = [
    ({"width": 4, "early_stopping": False}, STOPS, "length_penalty", (0.0, 1.0)),
    ({"width": 4, "early_stopping": True}, STOPS, "length_penalty", (0.5, -1.0)),
    ({"width": 3, "early_stopping": "never"}, STOPS, "length_penalty", (0.0, 1.5)),
    ({"width": 6, "early_stopping": False}, STOPS[:1], "length_penalty", (0.6, 2.0)),
    ({"width": 2, "early_stopping": False}, (), "length_penalty", (0.0, 1.0)),
]
DIVERSE = [
    ({"width": 4, "groups": 4}, (), "strength", (0.3, 0.8)),
    ({"width": 6, "groups": 3}, (), "strength", (0.2, 0.5)),
    ({"width": 6, "groups": 2}, (), "strength", (0.5, 1.5)),
    ({"width": 8, "groups": 4}, (), "strength", (0.2, 0.8)),
    ({"width": 4, "groups": 2}, (), "strength", (0.3, 3.0)),
]
CONTRASTIVE = [
    ({"k": 4}, (), "alpha", (0.2, 0.4, 0.6, 0.8)),
    ({"k": 5}, STOPS, "alpha", (0.1, 0.3, 0.6)),
    ({"k": 8}, STOPS[:1], "alpha", (0.3, 0.6, 0.9)),
]
GRID = {"beam": BEAM, "diverse_beam": DIVERSE, "contrastive": CONTRASTIVE}
SMOLLM2_TEXTS = (
    "The history of the printing press begins with",
    "def quicksort(items):",
    "Three things to know about whales:",
)
SMOLLM2_GRID = {
    "beam": [({"width": 4, "early_stopping": False}, (), "length_penalty", (1.0,))],
    "diverse_beam": [({"width": 6, "groups": 3}, (), "strength", (0.5,))],
    "contrastive": [({"k": 5}, (), "alpha", (0.6,))],
}


def tiny_model() -> torch.nn.Module:
    """Returns transformers' tiny Llama with the weights that follow from its tensors' names."""
    kind = dict(CONFIGS["llama"])
    config = transformers.AutoConfig.for_model(kind.pop("model_type"), **kind)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    made = weights({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(value) for name, value in made.items()})
    return model.eval()


def arguments(method: str, options: dict, setting: str, value: float) -> dict:
    """Returns the arguments of `generate` for a method of ours with its options."""
    if method == "contrastive":
        return {"top_k": options["k"], "penalty_alpha": value}
    beams = {"num_beams": options["width"], "num_return_sequences": options["width"]}
    if method == "beam":
        return {**beams, "length_penalty": value, "early_stopping": options["early_stopping"]}
    return {**beams, "num_beam_groups": options["groups"], "diversity_penalty": value, "length_penalty": 0.0}


def cut(tokens: list[int], stops: tuple[int, ...]) -> list[int]:
    """Returns tokens up to the first stop token, which is kept."""
    ends = [place + 1 for place, token in enumerate(tokens) if token in stops]
    return tokens[: min(ends, default=len(tokens))]


def generate(model: torch.nn.Module, prompt: list[int], stops: tuple[int, ...], new_tokens: int, **more) -> dict:
    """Returns the texts of one prompt, best first, and their scores (None where there are none)."""
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(stops) or None, pad_token_id=0)
    ids = torch.tensor([prompt])
    shared = {"do_sample": False, "max_new_tokens": new_tokens, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **shared, **more)
    scores = getattr(out, "sequences_scores", None)
    return {
        "texts": [cut(row[len(prompt) :].tolist(), stops) for row in out.sequences],
        "scores": None if scores is None else [round(float(score), 5) for score in scores],
    }


def cases(model: torch.nn.Module, grid: dict, prompts: list[list[int]], new_tokens: int) -> list[dict]:
    """Returns every case of a grid."""
    found = []
    for method, programs in grid.items():
        for options, stops, setting, values in programs:
            rows = [
                {"prompt": index, "value": value}
                | generate(model, prompt, stops, new_tokens, **arguments(method, options, setting, value))
                for value in values
                for index, prompt in enumerate(prompts)
            ]
            found.append({"method": method, "options": options, "stops": stops, "setting": setting, "rows": rows})
    return found


def main() -> None:
    """Writes the file."""
    path = Path(sys.argv[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    smollm2 = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, torch_dtype=torch.float32
    )
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SMOLLM2_TEXTS]
    values = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tiny": {"prompts": PROMPTS, "programs": cases(tiny_model(), GRID, PROMPTS, NEW_TOKENS)},
        "smollm2": {"prompts": encoded, "programs": cases(smollm2.eval(), SMOLLM2_GRID, encoded, 2 * NEW_TOKENS)},
    }
    OUT.write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
