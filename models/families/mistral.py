"""Mistral (2310.06825): the Llama layout, with a sliding window on every layer where the config gives one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig
from models.families import llama
from models.families.common import Family


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Mistral config to ours."""
    base = llama.read_config(config)
    block = base.blocks[0]
    attention = dataclasses.replace(block.attention, window=config.get("sliding_window"))
    blocks = (dataclasses.replace(block, attention=attention),) * base.num_layers
    return dataclasses.replace(base, family="mistral", blocks=blocks)


FAMILY = Family("mistral", ("mistral",), read_config, llama.FAMILY.hf, llama.FAMILY.gguf, llama.FAMILY.ignored)
