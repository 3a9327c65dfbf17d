"""Adapters: one file per method, one registry (`ADAPTERS`), shared functions in `adapter`."""

from finetune.adapters.adapter import Adapter
from finetune.adapters.lora import LoraConfig, lora

ADAPTERS = {"lora": (LoraConfig, lora)}  # type in a config -> (its config, its factory)
AdapterConfig = LoraConfig


def make_adapter(config: AdapterConfig) -> Adapter:
    """Returns the method that a config stands for."""
    return ADAPTERS[config.type][1](config)
