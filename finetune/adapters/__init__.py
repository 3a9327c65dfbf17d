"""Adapters: one file per method, one registry (`ADAPTERS`), shared functions in `adapter`."""

from finetune.adapters.adapter import Adapter
from finetune.adapters.lamda import LamdaConfig, lamda
from finetune.adapters.lamda_plus_plus import LamdaPlusPlusConfig, lamda_plus_plus
from finetune.adapters.lora import LoraConfig, lora
from finetune.adapters.lora_sb import LoraSbConfig, lora_sb
from finetune.adapters.lora_xs import LoraXsConfig, lora_xs
from finetune.adapters.nola import NolaConfig, nola
from finetune.adapters.sora import SoraConfig, sora

ADAPTERS = {  # type in a config -> (its config, its factory)
    "lamda": (LamdaConfig, lamda),
    "lamda_plus_plus": (LamdaPlusPlusConfig, lamda_plus_plus),
    "lora": (LoraConfig, lora),
    "lora_sb": (LoraSbConfig, lora_sb),
    "lora_xs": (LoraXsConfig, lora_xs),
    "nola": (NolaConfig, nola),
    "sora": (SoraConfig, sora),
}
AdapterConfig = LamdaConfig | LamdaPlusPlusConfig | LoraConfig | LoraSbConfig | LoraXsConfig | NolaConfig | SoraConfig


def make_adapter(config: AdapterConfig) -> Adapter:
    """Returns the method that a config stands for."""
    return ADAPTERS[config.type][1](config)
