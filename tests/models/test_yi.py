"""Yi as first released (other names of norms) and as Llama, against logits that transformers computed."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from models.weights.load import load_model
from tests.support.tiny_models import LENGTHS, tokens, weights, write_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "yi.npz"
CONFIG = {
    "model_type": "Yi",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e6,
    "tie_word_embeddings": False,
}
_LAYER = {
    "input_layernorm": (32,),
    "post_attention_layernorm": (32,),
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (4, 32),
    "self_attn.v_proj": (4, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
SHAPES = {
    "model.embed_tokens.weight": (61, 32),
    "model.norm.weight": (32,),
    "lm_head.weight": (61, 32),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in _LAYER.items()},
}
FIRST_NAMES = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}


def first_release(name):
    for later, first in FIRST_NAMES.items():
        name = name.replace(later, first)
    return name


def renamed(shapes):
    """The weights follow from Llama's names, and stand under those of the first release."""
    return {first_release(name): value for name, value in weights(shapes).items()}


@pytest.mark.parametrize("model_type", ["Yi", "llama"])
def test_logits_are_those_of_transformers(model_type, tmp_path, monkeypatch):
    if model_type == "Yi":
        monkeypatch.setattr("tests.support.tiny_models.weights", renamed)
    write_checkpoint(tmp_path / "m", {**CONFIG, "model_type": model_type}, SHAPES)
    model, params, _ = load_model(tmp_path / "m")
    assert model.config.family == model_type.lower()
    out = model.apply({"params": params}, jnp.asarray(tokens())).logits
    with np.load(GOLDEN) as golden:
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(out[row, :length], golden[str(row)], atol=1e-4, rtol=1e-4)


def test_names_of_the_other_release_are_told(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG, SHAPES)
    with pytest.raises(InputError, match="input_layernorm"):
        load_model(tmp_path / "m")
