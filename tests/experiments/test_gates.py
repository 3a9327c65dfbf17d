"""Gates by name: measured on texts that repeat, or drawn from a seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sparse.gates import head_gates
from decoding.sparse.lserve import LSERVE
from experiments.gates import gates_from
from experiments.loading import Loader
from models import load_model
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

WINDOW = {"sink": 8, "local": 24}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(str(write_tiny_folder(tmp_path_factory.mktemp("gates") / "tiny", max_length=256)))


def test_random_gates_come_from_their_seed(tiny):
    shapes = [len(layer) for layer in gates_from(1, *tiny, **WINDOW)]
    assert shapes == [block.attention.num_kv_heads for block in tiny[0].config.blocks]
    assert gates_from(1, *tiny, **WINDOW) == gates_from(1, *tiny, **WINDOW) != gates_from(2, *tiny, **WINDOW)


def test_measured_gates_are_the_mean_over_texts_that_repeat(tiny, monkeypatch):
    texts = []

    def seeing(model, params, tokens, **window):
        texts.append(tokens[0].tolist())
        return head_gates(model, params, tokens, **window)

    monkeypatch.setattr("decoding.sparse.gates.head_gates", seeing)
    gates = gates_from("measured", *tiny, **WINDOW)
    assert len(texts) == 2 and texts[0] != texts[1]
    for text in texts:
        assert len(text) == 256 and text[:128] == text[128:]
    alone = [head_gates(tiny[0], tiny[1], jnp.asarray([text]), **WINDOW) for text in texts]
    np.testing.assert_allclose(gates, np.mean(alone, axis=0), rtol=1e-6)
    assert np.min(gates) > 0 and np.max(gates) < 1
    LSERVE.options(gates=gates)
    assert len(jax.tree.leaves(gates)) == len(tiny[0].config.blocks)


def test_other_sources_are_refused(tiny):
    with pytest.raises(InputError, match="gates must be 'measured'"):
        gates_from("learned", *tiny, **WINDOW)
    with pytest.raises(InputError, match="nothing between sink"):
        gates_from("measured", *tiny, sink=128, local=256)


def test_a_loader_measures_once_for_a_window(tmp_path, monkeypatch):
    name, calls = str(write_tiny_folder(tmp_path / "tiny", max_length=256)), []

    def counted(source, *model, **window):
        calls.append((source, window))
        return gates_from(source, *model, **window)

    monkeypatch.setattr("experiments.gates.gates_from", counted)
    loader = Loader(None)
    options = {"gates": "measured", "budget": 64, "page": 16, "logical": 8, **WINDOW}
    one = loader.with_gates(name, options)
    assert loader.with_gates(name, {**options, "budget": 96})["gates"] == one["gates"] != "measured"
    loader.with_gates(name, {**options, "sink": 4})
    assert [window["sink"] for _, window in calls] == [8, 4]
    decode_fn, params, _ = loader.decode_fn(name, "lserve", options, draft=None, head=None, max_new_tokens=4)
    assert decode_fn.plan.options.gates == one["gates"] and len(calls) == 2
    assert loader.with_gates(name, {"budget": 64}) == {"budget": 64}
