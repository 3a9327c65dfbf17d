"""OLMoE (2409.02060): the Llama layout with norms on all of q and of k, and 64 experts in place of each MLP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig, MoEConfig
from models.errors import InputError
from models.families import llama
from models.families.common import LLAMA_HF, Family, experts_hf, field

NAMES = {name: f"{name}_proj" for name in ("up", "gate", "down")}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face OLMoE config to ours; raises InputError where it clips q, k and v."""
    if config.get("clip_qkv") is not None:
        raise InputError(f"olmoe with clip_qkv {config['clip_qkv']} is not supported: only models without clipping")
    base = llama.read_config({"rms_norm_eps": 1e-5} | dict(config))
    block = base.blocks[0]
    experts = MoEConfig(
        num_experts=field(config, "num_experts"),
        top_k=field(config, "num_experts_per_tok"),
        expert=block.mlp,
        normalise=bool(config.get("norm_topk_prob", False)),
        balance_weight=config.get("router_aux_loss_coef", 0.01),
    )
    block = dataclasses.replace(block, attention=dataclasses.replace(block.attention, qk_norm="joint"), mlp=experts)
    return dataclasses.replace(base, family="olmoe", blocks=(block,) * base.num_layers)


FAMILY = Family("olmoe", ("olmoe",), read_config, LLAMA_HF | experts_hf("mlp", NAMES), {}, llama.FAMILY.ignored)
