"""Writes codet5plus.npz and codet5plus.json: what tiny random models of CodeT5+'s shapes give, by transformers' parts.

transformers has no class for CodeT5+'s heads nor for its 2B to 16B models: their code comes with the published files.
The references here are put together from what it has: `T5EncoderModel` and `T5ForConditionalGeneration` with linear
layers behind them, and `T5EncoderModel` before a GPT-2 whose cross-attention adds nothing but in the last layer.

Run as `python -m tests.golden.make_codet5plus` where torch and transformers are installed.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden.make_families import saved_shapes, torch_model
from tests.support.codet5plus_models import GATE, HEADS, SMALL, cross_weights, written
from tests.support.tiny_models import CONFIGS, ENCODER_DECODERS, LENGTHS, targets, tokens, weights

FOLDER = Path(__file__).parent


def _mask() -> torch.Tensor:
    return torch.from_numpy((np.arange(14)[None, :] < np.array(LENGTHS)[:, None]).astype(np.int64))


def vectors(t5: torch.nn.Module) -> np.ndarray:
    """Returns the vectors f32[3, E] of the ragged batch: the first token's output, projected, of length 1."""
    heads = {name: torch.from_numpy(value) for name, value in weights(HEADS).items()}
    with torch.no_grad():
        first = t5.encoder(torch.from_numpy(tokens()).long(), attention_mask=_mask()).last_hidden_state[:, 0]
        found = torch.nn.functional.linear(first, heads["proj.weight"], heads["proj.bias"])
        return torch.nn.functional.normalize(found, dim=-1).numpy()


def matches(t5: torch.nn.Module) -> np.ndarray:
    """Returns the matching logits f32[3, 2] of `written` beside the ragged batch, from each row's last token."""
    heads = {name: torch.from_numpy(value) for name, value in weights(HEADS).items()}
    texts, lengths = written()
    with torch.no_grad():
        read = t5.encoder(torch.from_numpy(tokens()).long(), attention_mask=_mask()).last_hidden_state
        hidden = t5.decoder(
            torch.from_numpy(texts).long(), encoder_hidden_states=read, encoder_attention_mask=_mask()
        ).last_hidden_state
        last = hidden[torch.arange(3), torch.from_numpy(lengths).long() - 1]
        return torch.nn.functional.linear(last, heads["itm_head.weight"], heads["itm_head.bias"]).numpy()


def joined_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns (T5 encoder of another width, GPT-2 with cross-attention that counts in the last layer alone)."""
    small = torch_model(SMALL)
    kind = {name: value for name, value in CONFIGS["gpt2"].items() if name != "model_type"}
    config = transformers.GPT2Config(**kind, add_cross_attention=True, attn_implementation="eager")
    decoder = transformers.GPT2LMHeadModel(config).eval()
    decoder.load_state_dict(torch_model(CONFIGS["gpt2"]).state_dict(), strict=False)
    made = {name.removeprefix("joined."): torch.from_numpy(value) for name, value in cross_weights().items()}
    with torch.no_grad():
        for block in decoder.transformer.h:
            block.crossattention.c_proj.weight.zero_()
            block.crossattention.c_proj.bias.zero_()
        block = decoder.transformer.h[-1]
        cross = block.crossattention
        cross.q_attn.weight.copy_(made["q.kernel"])
        cross.q_attn.bias.copy_(made["q.bias"])
        cross.c_attn.weight.copy_(torch.cat([made["k.kernel"], made["v.kernel"]], 1))
        cross.c_attn.bias.copy_(torch.cat([made["k.bias"], made["v.bias"]]))
        cross.c_proj.weight.copy_(GATE * made["o.kernel"])
        cross.c_proj.bias.copy_(GATE * made["o.bias"])
        block.ln_cross_attn.weight.copy_(made["norm.scale"])
        block.ln_cross_attn.bias.copy_(made["norm.bias"])
    return small, decoder


def joined_logits(small: torch.nn.Module, decoder: torch.nn.Module) -> np.ndarray:
    """Returns f32[3, 16, V]: GPT-2 on `targets`, beside the ragged batch as the small encoder reads it."""
    made = {name: torch.from_numpy(value) for name, value in cross_weights().items()}
    with torch.no_grad():
        read = small.encoder(torch.from_numpy(tokens()).long(), attention_mask=_mask()).last_hidden_state
        read = read @ made["joined.bridge.kernel"] + made["joined.bridge.bias"]
        found = decoder(torch.from_numpy(targets()).long(), encoder_hidden_states=read, encoder_attention_mask=_mask())
        return found.logits.numpy()


def main() -> None:
    """Writes both files."""
    t5 = torch_model(ENCODER_DECODERS["t5"])
    arrays = {"vectors": vectors(t5), "matches": matches(t5), "joined": joined_logits(*joined_models())}
    shapes = {}
    for name, config in {"t5": ENCODER_DECODERS["t5"], "t5_small": SMALL, "gpt2": CONFIGS["gpt2"]}.items():
        with tempfile.TemporaryDirectory() as folder:
            torch_model(config).save_pretrained(folder)
            shapes[name] = saved_shapes(folder)
    np.savez_compressed(FOLDER / "codet5plus.npz", **arrays)
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "shapes": shapes}
    (FOLDER / "codet5plus.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
