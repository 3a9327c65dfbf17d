"""A random pair of small decoders with different vocabularies and widths, and contexts for it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from models.dolphin import Dolphin, DolphinConfig, with_memory
from tests.conftest import tiny_config

CONTEXTS = [[3, 40, 12, 5], [8, 8, 31, 2, 19, 44, 1, 70, 6, 6, 23], [90]]
MEMORY = 3


def small_pair(max_length: int = 64) -> tuple[Dolphin, dict[str, Any]]:
    """Returns (model, params): a compressor of 97 ids, 16 wide; a main decoder of 61 ids, 32 wide; varied texts."""
    block = BlockConfig(AttentionConfig(2, 1, 8), MLPConfig(24))
    small = DecoderConfig("llama", vocab_size=97, width=16, blocks=(block, block), max_length=max_length)
    config = tiny_config()
    main = dataclasses.replace(config, blocks=config.blocks[:2])
    model = Dolphin(DolphinConfig(small, main, MEMORY))
    token = jnp.zeros((1, 1), jnp.int32)
    parts = [
        jax.jit(Decoder(part).init)(jax.random.key(seed), token)["params"] for seed, part in ((1, small), (2, main))
    ]
    parts = [jax.tree.map(lambda x: x * 12.0 if x.ndim == 2 else x, part) for part in parts]
    return model, with_memory(model, jax.random.key(0), *parts)
