"""Tiny checkpoints in Hugging Face's layout, one per family variant: configs, and weights that follow from the tensors'
names.

The same weights can be made with and without torch, so logits that torch computed once can be checked without it.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0}
_SHORT = {"original_max_position_embeddings": 16}
_MIXTURE = {**_SIZES, "num_hidden_layers": 2, "num_experts_per_tok": 2}

CONFIGS: dict[str, dict] = {
    "llama": {"model_type": "llama", **_SIZES, "rope_theta": 10000.0},
    "llama_bias_tied": {
        "model_type": "llama",
        **_SIZES,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "llama_linear": {"model_type": "llama", **_SIZES, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama_llama3": {"model_type": "llama", **_SIZES, "rope_theta": 500.0, "rope_scaling": {**_LLAMA3, **_SHORT}},
    "llama_yarn": {"model_type": "llama", **_SIZES, "rope_theta": 100.0, "rope_scaling": {**_YARN, **_SHORT}},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    "qwen2_sliding": {
        "model_type": "qwen2",
        **_SIZES,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 16},
    "gemma3": {
        "model_type": "gemma3_text",
        **_SIZES,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "mixtral": {"model_type": "mixtral", **_MIXTURE, "num_local_experts": 4, "sliding_window": 5},
    "olmoe": {"model_type": "olmoe", **_MIXTURE, "num_experts": 4},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_MIXTURE,
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_hidden_layers": 3,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_MIXTURE,
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "head_dim": 16,
        "mlp_only_layers": [0],
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}

_T5 = {
    "model_type": "t5",
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
ENCODER_DECODERS: dict[str, dict] = {
    "t5": {**_T5, "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5_gated": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}

LENGTHS = (14, 9, 1)  # a ragged batch


def tokens() -> np.ndarray:
    """Returns the ragged batch, i32[3, 14], 0 behind each row's length."""
    batch = np.random.default_rng(0).integers(1, 61, (len(LENGTHS), max(LENGTHS)), dtype=np.int32)
    for row, length in zip(batch, LENGTHS, strict=True):
        row[length:] = 0
    return batch


def targets() -> np.ndarray:
    """Returns what decoders of encoder-decoders are given beside `tokens`, i32[3, 16]: start token 0, then others."""
    batch = np.random.default_rng(1).integers(1, 61, (len(LENGTHS), 16), dtype=np.int32)
    batch[:, 0] = 0
    return batch


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns f32 weights that depend on each tensor's name and shape alone."""
    made = {}
    for name, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        made[name] = values * (0.3 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5)
    return made


def write_checkpoint(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a Hugging Face folder with these weights in two shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = weights(shapes)
    names = sorted(tensors)
    shards = {f"model-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
