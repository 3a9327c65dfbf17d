"""New models: a small llama-type network with random weights, for training from scratch."""

import dataclasses

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, NormConfig, RopeConfig
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """A network's shape: RMSNorm, rotary positions, gated MLPs, embeddings tied to the output.

    Attributes:
        layers: L.
        width: D.
        heads: query heads H, each D / H wide.
        kv_heads: key/value heads K.
        mlp_width: F.
        max_length: tokens; the longest context.
        tokenizer: "bytes", "stories" (a word each, of the stories that code writes), or a model (a name or a path)
            whose tokenizer is used.
    """

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 768
    max_length: int = 512
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.kv_heads, self.mlp_width, self.max_length) < 1:
            raise InputError("layers, width, heads, kv_heads, mlp_width and max_length must be at least 1")
        if self.width % (2 * self.heads):
            raise InputError(f"width {self.width} must be a multiple of twice the heads, {self.heads}")


def scratch_model(config: ScratchConfig, vocab_size: int) -> Decoder:
    """Returns the network for a vocabulary."""
    attention = AttentionConfig(config.heads, config.kv_heads, config.width // config.heads, rope=RopeConfig())
    norm = NormConfig("rms", 1e-5)
    block = BlockConfig(attention, MLPConfig(config.mlp_width), norm)
    return Decoder(
        DecoderConfig(
            "llama", vocab_size, config.width, (block,) * config.layers, config.max_length, norm, tied_embeddings=True
        )
    )
