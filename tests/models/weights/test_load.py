"""`load_model` by name and path: what it takes, and what it says to the rest."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import models
from models.decoder import Decoder
from models.errors import InputError
from models.weights import load
from models.weights.load import find_model, load_model
from models.weights.registry import MODELS
from tests.support.tiny_models import CONFIGS, write_checkpoint

SHAPES = json.loads((Path(__file__).parents[2] / "golden" / "families.json").read_text())["shapes"]["llama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "m"
    write_checkpoint(folder, CONFIGS["llama"], SHAPES)
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instuct", "unknown model .*Did you mean 'smollm2-135m-instruct'"),
        ("gemma3", "unknown model 'gemma3'. Did you mean 'gemma3-270m'"),
        ("zzz", "unknown model 'zzz'. Known: .*smollm2-135m-instruct"),
        ("some/folder", "no such file or folder: some/folder"),
        ("./zzz.gguf", "no such file or folder: zzz.gguf"),
        ("model.gguf", "no such file or folder: model.gguf"),
        (Path("/no/such/place"), "no such file or folder: /no/such/place"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(InputError, match=message):
        load_model(name)


@pytest.mark.parametrize("dtype", ["float16", "bf16", "", 32])
def test_bad_dtypes_are_refused_before_anything_is_read(dtype):
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16 .*left out.*, got"):
        load_model("/no/such/place", dtype)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_folder_without_a_tokenizer(folder, dtype):
    model, params, tokenizer = loaded = load_model(folder, dtype)
    assert isinstance(model, Decoder) and tokenizer is None
    assert loaded.params is params and loaded.model is model
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype or "float32")}


def test_paths_may_be_strings_and_start_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/m") == folder == find_model(str(folder)) == find_model(folder)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no such file: .*config.json"):
        load_model(tmp_path)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello there, this is no model")
    with pytest.raises(InputError, match="notes.txt is not a readable GGUF file"):
        load_model(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", MODELS)
def test_registered_names_are_fetched(name, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "fetch", lambda name: tmp_path / name)
    assert find_model(name) == tmp_path / name


def test_public_names():
    assert models.load_model is load_model and models.Decoder is Decoder and models.InputError is InputError
    assert all(hasattr(models, name) for name in ("DecoderConfig", "LoadedModel", "save_model"))
    assert not hasattr(models, "torch_model")
