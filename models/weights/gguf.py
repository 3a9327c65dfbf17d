"""GGUF files: one file with the config, the tokenizer and the (mostly quantised) weights.

Tensors are dequantised to float32 one at a time, so that memory peaks little above the parameters themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.config import DecoderConfig, RopeConfig, RopeScaling
from models.errors import InputError
from models.families import FAMILIES, family_of
from models.layers import rotary_frequencies
from models.weights.assemble import assemble

# GGUF metadata (without the architecture's prefix) -> the key of a Hugging Face config.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GPT2_KEYS = {
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_attention_heads": "n_head",
}
_CHUNK = 1 << 20  # numbers dequantised at a time: small temporaries, and faster than a whole tensor at once
_SCALING_KEYS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.attn_factor": "attention_factor",
}


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: where it lies.
        fields: its metadata as plain Python values, by key ("llama.block_count", "tokenizer.ggml.tokens", ...).
        tensors: its tensors' names.
    """

    def __init__(self, path: Path):
        """Opens the file; raises InputError when it is missing, cut short or no GGUF file."""
        self.path = path
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        try:
            reader = _Reader(path)
            self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError, TypeError, OverflowError, MemoryError) as error:
            raise InputError(
                f"{path} is not a readable GGUF file (cut short or damaged? {type(error).__name__}: {error}); "
                "fetch it again, or check where it came from"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.tensors = list(self._tensors)

    @property
    def config(self) -> DecoderConfig:
        """The model's config; raises InputError for an architecture that no family here reads."""
        return family_of(self._hf_config()).read_config(self._hf_config())

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, f32, in the order that torch stores it ([out, in] for a matrix)."""
        tensor = self._tensors[name]
        out = np.empty(tuple(int(n) for n in tensor.shape[::-1]), np.float32)
        step = max(1, _CHUNK * len(tensor.data) // max(1, tensor.n_elements))
        try:
            for start in range(0, len(out), step):
                part = slice(start, start + step)
                out[part] = gguf.dequantize(tensor.data[part], tensor.tensor_type)
            return out
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: tensor {name!r} has type {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantise; convert the file to one of the common types (F32, F16, BF16, Q8_0, Q4_K_M, ...)"
            ) from error

    def _hf_config(self) -> dict[str, Any]:
        """The metadata under the names of a Hugging Face config, for the families' config readers."""
        architecture = str(self.fields.get("general.architecture"))
        values = {
            key.removeprefix(f"{architecture}."): value
            for key, value in self.fields.items()
            if key.startswith(f"{architecture}.")
        }
        config = {theirs: values[ours] for ours, theirs in _KEYS.items() if ours in values}
        config["model_type"] = "gemma3_text" if architecture == "gemma3" else architecture
        config["tie_word_embeddings"] = "output.weight" not in self._tensors
        if "token_embd.weight" in self._tensors:
            config["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        if architecture == "gpt2":
            config = {_GPT2_KEYS.get(key, key): value for key, value in config.items()}
        if "llama.rope.dimension_count" in self.fields:
            config.setdefault("head_dim", self.fields["llama.rope.dimension_count"])
        config["attention_bias"] = "blk.0.attn_output.bias" in self._tensors
        scaling = {theirs: values[ours] for ours, theirs in _SCALING_KEYS.items() if ours in values}
        if scaling.get("rope_type", "none") != "none":
            config["rope_scaling"] = scaling
        elif "rope_freqs.weight" in self._tensors:
            config["rope_scaling"] = self._llama3_scaling(config)
        return config

    def _llama3_scaling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Llama 3.1 and later store how much slower each frequency runs, in place of the rule's own numbers."""
        slower = self.read("rope_freqs.weight")
        scaling = RopeScaling("llama3", factor=float(slower.max()))
        plain = RopeConfig(config.get("rope_theta", 10_000.0))
        head_dim = 2 * slower.size
        expected = rotary_frequencies(plain, head_dim)[0] / slower
        ours = rotary_frequencies(RopeConfig(plain.theta, scaling), head_dim)[0]
        if not np.allclose(ours, expected, rtol=1e-4):
            raise InputError(
                f"{self.path}: rope_freqs.weight does not follow the llama3 rule with factor {slower.max()}"
            )
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
        }


def load_parameters(file: GGUFFile, dtype: jnp.dtype | None, mesh: Mesh | None = None) -> dict[str, Any]:
    """Returns the parameter tree of a GGUF file's model, in `dtype` (None: float32), spread over a mesh if given."""
    config = file.config
    family = FAMILIES[config.family]
    return assemble(config, family.gguf, file.tensors, file.read, ignored=family.ignored, dtype=dtype, mesh=mesh)


class _Reader(gguf.GGUFReader):
    """The package's reader over a plain array: slicing a memory map object costs four times as much."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)
