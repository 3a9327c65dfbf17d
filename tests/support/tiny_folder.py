"""A model folder small enough for tests of the mains: random weights, the tokenizer of bytes."""

from pathlib import Path

import jax
import jax.numpy as jnp

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from models.encoder_decoder import init_params, network
from models.families import family_of
from models.weights.byte_tokenizer import byte_tokenizer
from models.weights.orbax import save_model
from tests.support.tiny_models import ENCODER_DECODERS


def write_tiny_folder(folder: Path, with_tokenizer: bool = True, max_length: int = 128, seed: int = 1) -> Path:
    """Writes the model folder and returns its path."""
    block = BlockConfig(AttentionConfig(2, 1, 8), MLPConfig(24))
    config = DecoderConfig("llama", vocab_size=260, width=16, blocks=(block, block), max_length=max_length)
    model = Decoder(config)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    save_model(folder, model, params, byte_tokenizer() if with_tokenizer else None)
    return folder


def write_encoder_decoder_folder(folder: Path) -> Path:
    """Writes a model folder with a T5 and returns its path."""
    config = ENCODER_DECODERS["t5"] | {"vocab_size": 260, "num_layers": 1, "num_decoder_layers": 1}
    model = network(family_of(config).read_config(config))
    save_model(folder, model, init_params(model, jax.random.key(1)), byte_tokenizer())
    return folder
