"""A run that trains a small encoder in front of a model that stays as it is (`models.joined`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.train_config import TrainConfig
from finetune.state import Method, part_tuning
from models.encoder_decoder import Network, decoder_only
from models.errors import InputError
from models.joined import Part, join, trained_apart
from models.sharding import place
from models.weights.load import load_model
from models.weights.tokenizer import Tokenizer


def joined(config: TrainConfig, model: Network, params: Any, tokenizer: Tokenizer) -> tuple[Network, Any]:
    """Returns a model with an encoder in front of it; raises InputError where the encoder reads other tokens."""
    reader, read, other = load_model(config.join.encoder, config.dtype)
    if other is None or other.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise InputError(
            f"the encoder {config.join.encoder} reads other tokens than {config.model}: take one with its tokenizer"
        )
    encoder, decoder = (decoder_only(part, "joining") for part in (reader, model))
    parts = Part(encoder.config, read), Part(decoder.config, params)
    return join(*parts, config.join, jax.random.key(config.seed))


def encoder_tuning(params: Any, mesh: Mesh) -> tuple[Method, dict, Any, Callable[[Any], Any]]:
    """Returns (method, no frozen values, what is trained, function to what stays) of a joined model."""
    rest, trained = trained_apart(params)
    dtypes = jax.tree.map(lambda value: value.dtype, trained)
    trainable = jax.tree.map(lambda value: jnp.array(value, jnp.float32), trained)
    return part_tuning(dtypes), {}, place(trainable, mesh), lambda frozen: rest
