"""The acceptance head as a network, and its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.acceptance_head import AcceptanceHead, load_head, log_accept, read_hidden, save_head
from models.errors import InputError


def random_head(width: int, depth: int = 3):
    head = AcceptanceHead(depth).init(jax.random.key(0), jnp.zeros((1, width)))["params"]
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), head)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_head_by_hand(depth):
    head = jax.tree.map(np.asarray, random_head(4, 3))
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    wanted = x
    for _ in range(depth):
        inner = wanted @ head["block"]["kernel"] + head["block"]["bias"]
        wanted = wanted + inner / (1 + np.exp(-inner))
    logits = wanted @ head["out"]["kernel"] + head["out"]["bias"]
    params = {name: part for name, part in head.items() if depth or name != "block"}
    found = AcceptanceHead(depth).apply({"params": params}, x)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    chance = np.exp(logits[..., 1]) / np.exp(logits).sum(axis=-1)
    np.testing.assert_allclose(jnp.exp(log_accept(found)), chance, rtol=1e-4)


def test_the_hidden_state_is_the_one_that_logits_come_from(tiny):
    model, params = tiny
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    logits, hidden, _ = model.apply({"params": params}, tokens, method=read_hidden)
    np.testing.assert_allclose(logits, model.apply({"params": params}, tokens).logits, atol=1e-5)
    np.testing.assert_allclose(hidden @ params["unembedding"]["kernel"], logits, rtol=1e-3, atol=1e-3)
    places = jnp.array([[3, 1], [0, 0]])
    some = model.apply({"params": params}, tokens, None, places, method=read_hidden)
    np.testing.assert_array_equal(some[1], jnp.take_along_axis(hidden, places[..., None], axis=1))
    assert some[0].shape == (2, 2, 61)


def test_a_file_gives_the_head_back(tmp_path):
    head, path = random_head(4, 2), tmp_path / "deep" / "head.safetensors"
    save_head(path, head, draft="/some/folder/small.gguf", depth=2, facts={"target": "large"})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    again, depth = load_head(path, "small.gguf", 4)
    assert depth == 2
    jax.tree.map(np.testing.assert_array_equal, again, head)


def test_files_that_do_not_fit(tmp_path):
    path = tmp_path / "head.safetensors"
    with pytest.raises(InputError, match="train one with python -m experiments.train_acceptance_head --draft small"):
        load_head(path, "small", 4)
    save_head(path, random_head(4), draft="small", depth=3, facts={})
    with pytest.raises(InputError, match="is a head for draft 'small', not for 'other'"):
        load_head(path, "other", 4)
    with pytest.raises(InputError, match="does not fit a draft of width 5"):
        load_head(path, "small", 5)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_head(path, "small", 4)
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(InputError, match="holds no acceptance head"):
        load_head(path, "small", 4)
    with pytest.raises(InputError, match="cannot write the head"):
        save_head(path / "inside", random_head(4), draft="small", depth=3, facts={})
