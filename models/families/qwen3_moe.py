"""Qwen3-MoE (2505.09388): Qwen3 with 128 experts in place of MLPs, and no shared one."""

from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig
from models.families import llama, qwen3
from models.families.common import LLAMA_HF, Family, experts_hf
from models.families.olmoe import NAMES
from models.families.qwen2_moe import plain, with_experts


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Qwen3-MoE config to ours."""
    width = {} if config.get("head_dim") else {"head_dim": None}
    return with_experts(qwen3.read_config(plain(config) | width), config, shared=None)


FAMILY = Family("qwen3_moe", ("qwen3_moe",), read_config, LLAMA_HF | experts_hf("mlp", NAMES), {}, llama.FAMILY.ignored)
