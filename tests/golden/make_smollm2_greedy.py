"""Writes smollm2_greedy.json: 64 greedy tokens of SmolLM2-135M-Instruct on 8 prompts, by transformers in float32.

The weights are those of the same GGUF file, dequantised by transformers' own reader. Run as
`python -m tests.golden.make_smollm2_greedy` where torch and transformers are installed (`make parity` installs them).
"""

import json
from pathlib import Path

import torch
import transformers

from models.weights.fetch import fetch
from models.weights.load import load_model

OUT = Path(__file__).with_name("smollm2_greedy.json")
NEW_TOKENS = 64
PROMPTS = (
    "Why do cats purr?",
    "Write a haiku about the sea.",
    "def quicksort(items):",
    "Translate to French: Good morning, my friend.",
    "What is 17 + 26? Explain each step.",
    "List the planets of the solar system in order.",
    "The history of the printing press begins with",
    "Summarise: The river rose in the night, and by morning the lower fields were under water. The farmers moved their "
    "animals to the hill and waited three days for it to fall.",
)


def torch_model() -> torch.nn.Module:
    """Returns transformers' model with the weights of the default GGUF file."""
    path = fetch("smollm2-135m-instruct")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def greedy(model: torch.nn.Module, prompt: list[int], stop_tokens: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """Returns the new tokens, a stop token included, and the gap of the two highest logits at each."""
    tokens, gaps, cache, step = [], [], None, torch.tensor([prompt])
    with torch.no_grad():
        while len(tokens) < NEW_TOKENS and not (tokens and tokens[-1] in stop_tokens):
            output = model(step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            top = output.logits[0, -1].topk(2)
            tokens.append(int(top.indices[0]))
            gaps.append(round(float(top.values[0] - top.values[1]), 5))
            step = top.indices[:1][None]
    return tokens, gaps


def main() -> None:
    """Writes the file."""
    tokenizer = load_model("smollm2-135m-instruct").tokenizer
    model = torch_model()
    prompts = [tokenizer.encode_chat(p) if i % 2 == 0 else tokenizer.encode(p) for i, p in enumerate(PROMPTS)]
    rows = [greedy(model, prompt, tokenizer.stop_ids) for prompt in prompts]
    values = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stop_tokens": tokenizer.stop_ids,
        "prompts": prompts,
        "tokens": [tokens for tokens, _ in rows],
        "gaps": [gaps for _, gaps in rows],
    }
    OUT.write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
