"""Adapters: one file per method, one registry (`ADAPTERS`), shared functions in `adapter`."""

from finetune.adapters.adapter import Adapter
from finetune.adapters.lora import LoraConfig, lora
from finetune.adapters.lora_sb import LoraSbConfig, lora_sb
from finetune.adapters.lora_xs import LoraXsConfig, lora_xs

ADAPTERS = {  # type in a config -> (its config, its factory)
    "lora": (LoraConfig, lora),
    "lora_sb": (LoraSbConfig, lora_sb),
    "lora_xs": (LoraXsConfig, lora_xs),
}
AdapterConfig = LoraConfig | LoraSbConfig | LoraXsConfig


def make_adapter(config: AdapterConfig) -> Adapter:
    """Returns the method that a config stands for."""
    return ADAPTERS[config.type][1](config)
