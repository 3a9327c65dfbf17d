"""Model folders of our own: what is saved comes back bit for bit, and nothing half-written stays behind."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, RopeConfig, RopeScaling
from models.decoder import Decoder
from models.errors import InputError
from models.weights import orbax, whole
from models.weights.load import load_model
from models.weights.orbax import CONFIG_NAME, save_model

BLOCK = BlockConfig(AttentionConfig(2, 1, 8, rope=RopeConfig(100.0, RopeScaling("yarn", 4.0))), MLPConfig(24))
LOCAL = dataclasses.replace(BLOCK, attention=dataclasses.replace(BLOCK.attention, window=3), post_norms=True)
CONFIG = DecoderConfig("gemma3", vocab_size=23, width=16, blocks=(BLOCK, LOCAL), max_length=16, logit_softcap=3.0)


def random_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype), tree)


def cast(params, dtype):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.dtype(dtype))), params)


def save(folder, params=None):
    save_model(folder, Decoder(CONFIG), random_params() if params is None else params)
    return folder


def same_bits(a, b):
    a, b = (jax.tree.map(np.asarray, tree) for tree in (a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype, tmp_path):
    params = random_params(jnp.dtype(dtype))
    folder = save(tmp_path / "new" / "m", params)
    loaded = load_model(folder)
    assert loaded.model == Decoder(CONFIG) and loaded.model.config == CONFIG and loaded.tokenizer is None
    same_bits(loaded.params, params)
    assert [path.name for path in folder.parent.iterdir()] == ["m"], "no staging folder is left"


def test_dtypes_are_kept_one_by_one_and_converted_on_request(tmp_path):
    params = random_params()
    params["embedding"] = cast(params["embedding"], "bfloat16")
    folder = save(tmp_path / "m", params)
    same_bits(load_model(folder).params, params)
    for dtype in ("float32", "bfloat16"):
        same_bits(load_model(folder, dtype).params, cast(params, dtype))


@pytest.mark.parametrize("kind", ["model", "empty folder", "file"])
def test_what_exists_is_not_touched(kind, tmp_path):
    folder = tmp_path / "m"
    if kind == "model":
        save(folder)
    elif kind == "file":
        folder.write_text("mine")
    else:
        folder.mkdir()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="m exists already; choose another folder or remove it first"):
        save(folder)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("error", "expected"), [(OSError("disk full"), InputError), (KeyboardInterrupt(), None)])
@pytest.mark.parametrize("step", ["config", "move"])
def test_nothing_is_left_when_saving_fails(step, error, expected, tmp_path, monkeypatch):
    """The parameters are written already when the failure comes; the folder must still not appear."""

    def fail(*args, **kwargs):
        raise error

    target = {"config": (orbax, "config_to_dict"), "move": (whole.os, "replace")}[step]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(expected or type(error), match="cannot write .*disk full" if expected else None):
            save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_model_takes_another_s_place_when_asked_to(tmp_path):
    folder, params = tmp_path / "model", random_params()
    save_model(folder, Decoder(CONFIG), params)
    save_model(folder, Decoder(CONFIG), jax.tree.map(lambda x: x + 1, params), replace=True)
    jax.tree.map(np.testing.assert_array_equal, load_model(folder).params, jax.tree.map(lambda x: x + 1, params))
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(InputError, match="exists already"):
        save_model(folder, Decoder(CONFIG), params, replace=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save(tmp_path / "file" / "m")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "m")


def edit_config(folder, change):
    values = json.loads((folder / CONFIG_NAME).read_text())
    change(values)
    (folder / CONFIG_NAME).write_text(json.dumps(values))


def empty_files(folder):
    for path in (folder / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def cut_metadata(folder):
    path = folder / "params" / "_METADATA"
    path.write_bytes(path.read_bytes()[:1000])


DAMAGE = {
    "newer format": (lambda f: edit_config(f, lambda v: v.update(format=2)), "has format 2; this version reads 1"),
    "no format": (lambda f: edit_config(f, lambda v: v.pop("format")), "has format None; this version reads 1"),
    "no config": (lambda f: edit_config(f, lambda v: v.pop("config")), "model config: family"),
    "cut config": (lambda f: (f / CONFIG_NAME).write_text('{"format": 1, '), f"{CONFIG_NAME} is not valid JSON"),
    "list as config": (lambda f: (f / CONFIG_NAME).write_text("[1]"), CONFIG_NAME),
    "bad entry": (
        lambda f: edit_config(f, lambda v: v["config"]["blocks"][1]["mlp"].update(width="wide")),
        r"blocks\.1\.mlp\.width",
    ),
    "another width": (
        lambda f: edit_config(f, lambda v: v["config"].update(width=8)),
        "the parameters do not fit the config",
    ),
    "more layers": (
        lambda f: edit_config(f, lambda v: v["config"]["blocks"].append(v["config"]["blocks"][0])),
        "the parameters do not fit the config",
    ),
    "no parameters": (lambda f: shutil.rmtree(f / "params"), "params is not a readable checkpoint"),
    "empty files": (empty_files, "params is not a readable checkpoint"),
    "cut metadata": (cut_metadata, "params is not a readable checkpoint"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders(what, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "m")
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_data_that_cannot_be_read(saved, monkeypatch):
    """What orbax does when the data files are cut short or gone: a bare Exception, pages long."""

    def restore(*args, **kwargs):
        raise Exception("Encountered error while reading array index: (slice(0, 16, 1), slice(0, 24, 1)).")

    monkeypatch.setattr(orbax.ocp.StandardCheckpointer, "restore", restore)
    with pytest.raises(InputError, match="params is not a readable checkpoint"):
        load_model(saved)


def test_saved_folders_are_as_readable_as_any_other(saved):
    """Others of the same machine may use the model: the permissions are those of a folder made next to it."""
    beside = saved.parent / "beside"
    beside.mkdir()
    assert saved.stat().st_mode == beside.stat().st_mode
