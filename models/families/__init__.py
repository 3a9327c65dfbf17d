"""The architectures that are known: a literal registry, one file per family."""

from collections.abc import Mapping
from typing import Any

from models.errors import unknown_name
from models.families import gemma3, gpt2, llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe, t5, yi
from models.families.common import Family

FAMILIES: dict[str, Family] = {
    "gemma3": gemma3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "t5": t5.FAMILY,
    "yi": yi.FAMILY,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family that a Hugging Face config's `model_type` names; raises InputError for an unknown one."""
    by_type = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
    model_type = str(config.get("model_type"))
    if model_type not in by_type:
        raise unknown_name("model_type", model_type, by_type)
    return by_type[model_type]
