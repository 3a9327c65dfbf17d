"""Hugging Face folders that are incomplete or damaged, and the forms in which good ones come."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.errors import InputError
from models.weights.load import load_model
from models.weights.safetensors import read_json
from tests.support.tiny_models import CONFIGS, write_checkpoint

SHAPES = json.loads((Path(__file__).parents[2] / "golden" / "families.json").read_text())["shapes"]["llama"]
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A good folder of two shards, to be damaged."""
    write_checkpoint(tmp_path / "m", CONFIGS["llama"], SHAPES)
    return tmp_path / "m"


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def drop_config_entry(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["hidden_size"]
    (folder / "config.json").write_text(json.dumps(values))


DAMAGE = {
    "missing shard": (lambda f: (f / SECOND).unlink(), f"missing weights: .*{SECOND}"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], r"missing weights: no \*\.safetensors file"),
    "cut data": (lambda f: cut(f / SECOND, -10), f"{SECOND} is not a readable safetensors file"),
    "cut header": (lambda f: cut(f / SECOND, 20), f"{SECOND} is not a readable safetensors file"),
    "empty shard": (lambda f: cut(f / SECOND, 0), f"{SECOND} is not a readable safetensors file"),
    "noise": (lambda f: (f / SECOND).write_bytes(np.random.default_rng(0).bytes(999)), f"{SECOND} is not a readable"),
    "no config": (lambda f: (f / "config.json").unlink(), "no such file: .*config.json"),
    "cut config": (lambda f: cut(f / "config.json", 30), "config.json is not valid JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "list as config": (lambda f: (f / "config.json").write_text("[1, 2]"), "config.json"),
    "config entry": (drop_config_entry, "no 'hidden_size'.*llama"),
    "cut index": (lambda f: cut(f / INDEX, 30), f"{INDEX} is not valid JSON"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), INDEX),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders(what, folder):
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_one_file_or_several_with_or_without_an_index(folder):
    expected = load_model(folder).params
    (folder / INDEX).unlink()
    assert same(load_model(folder).params, expected), "two shards without an index"
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    assert same(load_model(str(folder)).params, expected), "one file"


def test_only_the_files_of_the_index_are_read(folder):
    """Folders often hold a second copy of the weights in another layout."""
    expected = load_model(folder).params
    save_file({"stray": np.zeros(2, np.float32)}, folder / "consolidated.safetensors")
    assert same(load_model(folder).params, expected)


def test_read_json(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"a": "é"}
