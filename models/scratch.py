"""New models: a small llama-type network, or one with an encoder, with random weights, for training from scratch."""

import dataclasses

from models.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    EncoderDecoderConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
)
from models.encoder_decoder import Network, network
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """A network's shape: RMSNorm, rotary positions, gated MLPs, embeddings tied to the output.

    Attributes:
        layers: L; of a model with an encoder, those of the decoder.
        encoder_layers: of the encoder; 0: a decoder-only model.
        width: D.
        heads: query heads H, each D / H wide.
        kv_heads: key/value heads K.
        mlp_width: F.
        max_length: tokens; the longest context, and the longest text that an encoder reads.
        tokenizer: "bytes", "stories" (a word each, of the stories that code writes), or a model (a name or a path)
            whose tokenizer is used.
    """

    layers: int = 6
    encoder_layers: int = 0
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 768
    max_length: int = 512
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.kv_heads, self.mlp_width, self.max_length) < 1:
            raise InputError("layers, width, heads, kv_heads, mlp_width and max_length must be at least 1")
        if self.encoder_layers < 0:
            raise InputError(f"encoder_layers must not be negative (0: no encoder), got {self.encoder_layers}")
        if self.width % (2 * self.heads):
            raise InputError(f"width {self.width} must be a multiple of twice the heads, {self.heads}")


def scratch_model(config: ScratchConfig, vocab_size: int) -> Network:
    """Returns the network for a vocabulary; what the decoder of one with an encoder writes begins with token 0."""
    attention = AttentionConfig(config.heads, config.kv_heads, config.width // config.heads, rope=RopeConfig())
    norm = NormConfig("rms", 1e-5)
    block = BlockConfig(attention, MLPConfig(config.mlp_width), norm)

    def stack(blocks: tuple[BlockConfig, ...]) -> DecoderConfig:
        return DecoderConfig("llama", vocab_size, config.width, blocks, config.max_length, norm, tied_embeddings=True)

    if not config.encoder_layers:
        return network(stack((block,) * config.layers))
    cross = dataclasses.replace(block, cross=dataclasses.replace(attention, rope=None))
    encoder, decoder = stack((block,) * config.encoder_layers), stack((cross,) * config.layers)
    return network(EncoderDecoderConfig(encoder, decoder))
