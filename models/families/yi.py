"""Yi (2403.04652) as it was first released: Llama, with the two norms of a block called `ln1` and `ln2`.

Later releases carry Llama's own names and say `model_type: llama`; so do GGUF files of either.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig
from models.families import llama
from models.families.common import LLAMA_HF, Family, Row, keep


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Maps a Hugging Face Yi config to ours."""
    return dataclasses.replace(llama.read_config(config), family="yi")


FAMILY = Family(
    name="yi",
    model_types=("Yi",),
    read_config=read_config,
    hf=LLAMA_HF
    | {
        "layers_{i}/attention_norm/scale": Row("layers.{i}.ln1.weight", keep),
        "layers_{i}/mlp_norm/scale": Row("layers.{i}.ln2.weight", keep),
    },
    gguf=llama.FAMILY.gguf,
    ignored=llama.FAMILY.ignored,
)
