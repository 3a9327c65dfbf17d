"""Qwen3 (2505.09388): Qwen2 with norms on q and k in place of their biases, and a head width of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig
from models.families import llama
from models.families.common import BASE_GGUF, LLAMA_HF, Family
from models.families.qwen2 import sliding_blocks


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Qwen3 config to ours."""
    base = llama.read_config({"head_dim": 128} | dict(config))
    block = base.blocks[0]
    block = dataclasses.replace(block, attention=dataclasses.replace(block.attention, qk_norm=True))
    return dataclasses.replace(base, family="qwen3", blocks=sliding_blocks(block, base.num_layers, config))


FAMILY = Family("qwen3", ("qwen3",), read_config, LLAMA_HF, BASE_GGUF, llama.FAMILY.ignored)
