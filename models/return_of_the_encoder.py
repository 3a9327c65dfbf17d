"""Shapes of Return of the Encoder (2501.16273): the released encoder-decoder, and pairs of equal parameters.

The released model reads with two thirds of its layers and writes with one; blocks have rotary positions, RMSNorm,
grouped heads and plain tanh-GELU MLPs with biases.

Deviations. There is no dropout. Positions of a source begin at 0 where the released code centres them: scores depend on
differences alone, so that rounding is all that changes. Query head h reads key head h // G, not h mod K: a renaming of
heads that are trained from nothing.
"""

import dataclasses
import math

from models.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    EncoderDecoderConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from models.encoder_decoder import Network
from models.errors import InputError
from models.scratch import ScratchConfig, scratch_model
from models.weights.assemble import parameter_shapes


def released_config(vocab_size: int = 32_128) -> ModelConfig:
    """Returns the shape of the released text model: 20 and 10 layers, 332 million parameters."""
    attention = AttentionConfig(6, 3, 64, qkv_bias=True, out_bias=True, rope=RopeConfig())
    block = BlockConfig(attention, MLPConfig(4096, "gelu_tanh", gated=False, bias=True), NormConfig("rms", 1e-6))
    cross = dataclasses.replace(block, cross=dataclasses.replace(attention, rope=None))

    def stack(blocks: tuple[BlockConfig, ...]) -> DecoderConfig:
        return DecoderConfig("mu", vocab_size, 1024, blocks, 4096, block.norm, tied_embeddings=True)

    return EncoderDecoderConfig(stack((block,) * 20), stack((cross,) * 10))


def num_parameters(model: Network) -> int:
    """Returns how many numbers a model has; makes none of them."""
    return sum(math.prod(leaf.shape) for leaf in parameter_shapes(model).values())


def split(shape: ScratchConfig, share: float) -> ScratchConfig:
    """Returns a shape with all of its layers dealt out anew: this share of them reads, 0 gives a decoder-only model.

    Raises:
        InputError: a share that leaves no layer to write with, or that is negative.
    """
    total = shape.layers + shape.encoder_layers
    reading = round(share * total)
    if share < 0 or reading >= total:
        raise InputError(f"the share of layers that read must be from 0 up and leave one that writes, got {share}")
    return dataclasses.replace(shape, layers=total - reading, encoder_layers=reading)


def matched(shape: ScratchConfig, like: ScratchConfig, vocab_size: int) -> ScratchConfig:
    """Returns a shape with as many parameters as another one, as nearly as the width of its MLPs can make it.

    Embeddings count on both sides. Cross attention is what an encoder-decoder of the same layers has more; a
    decoder-only model gets wider MLPs for it.

    Raises:
        InputError: the rest of the shape alone has more parameters.
    """

    def count(width: int) -> int:
        return num_parameters(scratch_model(dataclasses.replace(shape, mlp_width=width), vocab_size))

    each = (count(9) - count(1)) // 8  # parameters grow in proportion to the width
    wanted = num_parameters(scratch_model(like, vocab_size))
    width = round((wanted - count(1)) / each) + 1
    if width < 1:
        raise InputError(
            f"a model of this shape has more than {wanted:,} parameters whatever its MLPs: take fewer layers"
        )
    return dataclasses.replace(shape, mlp_width=width)
