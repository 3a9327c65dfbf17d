"""A model folder small enough for tests of the mains: random weights, a byte-level tokenizer, a chat template."""

from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from models.weights.orbax import save_model
from models.weights.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def tiny_tokenizer() -> Tokenizer:
    """Returns a tokenizer of the 256 bytes and one special end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    end = backend.token_to_id("<|im_end|>")
    return Tokenizer(backend, bos_id=None, eos_id=end, pad_id=None, stop_ids=(end,), chat_template=TEMPLATE)


def write_tiny_folder(folder: Path, with_tokenizer: bool = True, max_length: int = 128) -> Path:
    """Writes the model folder and returns its path."""
    block = BlockConfig(AttentionConfig(2, 1, 8), MLPConfig(24))
    config = DecoderConfig("llama", vocab_size=260, width=16, blocks=(block, block), max_length=max_length)
    model = Decoder(config)
    params = model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    save_model(folder, model, params, tiny_tokenizer() if with_tokenizer else None)
    return folder
