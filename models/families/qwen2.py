"""Qwen2 and Qwen2.5 (2407.10671, 2412.15115): the Llama layout with biases on q, k and v, and optional sliding
layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import BlockConfig, DecoderConfig
from models.families import llama
from models.families.common import BASE_GGUF, LLAMA_HF, Family


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Qwen2 config to ours."""
    base = llama.read_config(config)
    block = base.blocks[0]
    block = dataclasses.replace(block, attention=dataclasses.replace(block.attention, qkv_bias=True, out_bias=False))
    return dataclasses.replace(base, family="qwen2", blocks=sliding_blocks(block, base.num_layers, config))


def sliding_blocks(block: BlockConfig, num_layers: int, config: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    """Returns the blocks; `layer_types`, or else `max_window_layers`, says which of them have the sliding window."""
    if not config.get("use_sliding_window", False):
        return (block,) * num_layers
    first = config.get("max_window_layers", num_layers)
    kinds = config.get("layer_types") or ["sliding_attention" if i >= first else "full" for i in range(num_layers)]
    sliding = dataclasses.replace(
        block, attention=dataclasses.replace(block.attention, window=config["sliding_window"])
    )
    return tuple(sliding if kind == "sliding_attention" else block for kind in kinds)


FAMILY = Family("qwen2", ("qwen2",), read_config, LLAMA_HF, BASE_GGUF, llama.FAMILY.ignored)
