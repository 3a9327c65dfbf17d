"""Qwen2-MoE (2407.10671, section 2.2.2) and Qwen1.5-MoE: Qwen2 with experts in place of MLPs, beside a shared expert
that every token goes to.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig, MLPConfig, MoEConfig
from models.errors import InputError
from models.families import llama, qwen2
from models.families.common import LLAMA_HF, Family, Row, experts_hf, field, transpose
from models.families.olmoe import NAMES


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Qwen2-MoE config to ours."""
    base = qwen2.read_config(plain(config))
    if not config.get("qkv_bias", True):
        block = dataclasses.replace(
            base.blocks[0], attention=dataclasses.replace(base.blocks[0].attention, qkv_bias=False)
        )
        base = dataclasses.replace(base, blocks=(block,) * base.num_layers)
    return with_experts(base, config, shared=field(config, "shared_expert_intermediate_size"))


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config without its sliding window, which no released model uses; raises InputError for one that does.

    (Which layers slide is told otherwise here than in Qwen2 and Qwen3.)
    """
    if config.get("use_sliding_window"):
        raise InputError(f"a {config.get('model_type')} model with a sliding window is not supported")
    return dict(config)


def with_experts(base: DecoderConfig, config: Mapping[str, Any], shared: int | None) -> DecoderConfig:
    """Returns a config with experts in the layers that `decoder_sparse_step` and `mlp_only_layers` name."""
    mlp = base.blocks[0].mlp
    experts = MoEConfig(
        num_experts=field(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=field(config, "num_experts_per_tok"),
        expert=dataclasses.replace(mlp, width=field(config, "moe_intermediate_size")),
        normalise=bool(config.get("norm_topk_prob", False)),
        shared=None if shared is None else MLPConfig(shared, mlp.activation),
        balance_weight=config.get("router_aux_loss_coef", 0.001),
    )
    every, without = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    blocks = tuple(
        dataclasses.replace(block, mlp=experts) if (i + 1) % every == 0 and i not in without else block
        for i, block in enumerate(base.blocks)
    )
    return dataclasses.replace(base, family=str(config["model_type"]), blocks=blocks)


_SHARED = {
    "layers_{i}/mlp/shared_gate/kernel": Row("layers.{i}.mlp.shared_expert_gate.weight", transpose),
    **{
        f"layers_{{i}}/mlp/shared/{ours}/kernel": Row(f"layers.{{i}}.mlp.shared_expert.{theirs}.weight", transpose)
        for ours, theirs in NAMES.items()
    },
}
FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    read_config=read_config,
    hf=LLAMA_HF | experts_hf("mlp", NAMES) | _SHARED,
    gguf={},
    ignored=llama.FAMILY.ignored,
)
