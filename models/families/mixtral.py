"""Mixtral (2401.04088): the Mistral layout with eight experts in place of each MLP, two of them for a token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig, MoEConfig
from models.families import mistral
from models.families.common import LLAMA_HF, Family, experts_hf, field


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Mixtral config to ours."""
    base = mistral.read_config({"rope_theta": 1e6} | dict(config))
    block = base.blocks[0]
    experts = MoEConfig(
        num_experts=field(config, "num_local_experts"),
        top_k=field(config, "num_experts_per_tok"),
        expert=block.mlp,
        balance_weight=config.get("router_aux_loss_coef", 0.001),
    )
    blocks = (dataclasses.replace(block, mlp=experts),) * base.num_layers
    return dataclasses.replace(base, family="mixtral", blocks=blocks)


_EXPERTS = experts_hf("block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"})
FAMILY = Family("mixtral", ("mixtral",), read_config, LLAMA_HF | _EXPERTS, {}, mistral.FAMILY.ignored)
