"""CodeT5+'s shapes beside parts of transformers, live."""

import json

import numpy as np

from models.weights.load import load_model
from tests.golden import make_codet5plus as reference
from tests.golden.make_families import torch_model
from tests.support.codet5plus_models import joined, write_bimodal, write_embedding, written
from tests.support.tiny_models import ENCODER_DECODERS, LENGTHS, targets, tokens

SOURCE = (tokens(), np.array(LENGTHS, np.int32))
SHAPES = json.loads((reference.FOLDER / "codet5plus.json").read_text())["shapes"]


def test_vectors_and_matches(tmp_path):
    t5 = torch_model(ENCODER_DECODERS["t5"])
    write_bimodal(tmp_path / "both", SHAPES["t5"])
    write_embedding(tmp_path / "one", SHAPES["t5"])
    for name in ("both", "one"):
        model, params, _ = load_model(tmp_path / name)
        found = model.apply({"params": params}, *SOURCE, method="embed_text")
        np.testing.assert_allclose(found, reference.vectors(t5), atol=1e-5)
    model, params, _ = load_model(tmp_path / "both")
    encoded = model.apply({"params": params}, *SOURCE, method="encode")
    found = model.apply({"params": params}, *written(), encoded, method="match")
    np.testing.assert_allclose(found, reference.matches(t5), atol=1e-4)


def test_a_small_encoder_before_a_larger_decoder(tmp_path):
    model, params, _, _ = joined(tmp_path, SHAPES)
    found = model.apply({"params": params}, targets(), source=SOURCE).logits
    np.testing.assert_allclose(found, reference.joined_logits(*reference.joined_models()), atol=1e-4)
