import dataclasses
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from finetune.adapters import ADAPTERS, LoraConfig, make_adapter, saved
from finetune.adapters.adapter import attach, merge, rebase, select
from finetune.adapters.saved import CONFIG_NAME, Base, base_of, content_hash, load_adapter, save_adapter, with_adapter
from models.errors import InputError
from tests.support.moved_adapters import moved_adapter

CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("q", "down"))


def values(params, config=CONFIG, seed=0):
    """(frozen, trainable) away from their start."""
    frozen, trainable = make_adapter(config).init(jax.random.key(seed), select(params, config.targets), None)
    return frozen, jax.tree.map(lambda x: x + 0.1, trainable)


@pytest.fixture
def folder(tiny, tmp_path):
    path = tmp_path / "run" / "adapter"
    save_adapter(path, CONFIG, *values(tiny[1]), base_of("a/b/tiny.gguf", tiny[1]))
    return path


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_an_adapter_comes_back_as_it_was(tiny, folder):
    again = load_adapter(folder, base_of("tiny.gguf", tiny[1]))
    assert again.config == CONFIG and again.base.name == "tiny.gguf"
    same((again.frozen, again.trainable), values(tiny[1]))


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_method_comes_back(name, tiny, tmp_path):
    """Its values are read by the same factors: the model with it has the logits it had."""
    model, params = tiny
    config, adapter, frozen, trainable = moved_adapter(name, params, ("q", "down"))
    save_adapter(tmp_path / "adapter", config, frozen, trainable, base_of("tiny", params))
    again = load_adapter(tmp_path / "adapter", base_of("tiny", params))
    assert again.config == config
    same((again.frozen, again.trainable), (frozen, trainable))
    tokens = jnp.arange(12, dtype=jnp.int32)[None, :]
    expected = model.apply({"params": merge(adapter, rebase(adapter, params, frozen), frozen, trainable)}, tokens)
    merged = with_adapter(tmp_path / "adapter", "tiny", params)
    np.testing.assert_array_equal(model.apply({"params": merged}, tokens).logits, expected.logits)


def test_an_adapter_that_gave_up_everything_comes_back(tiny, tmp_path):
    save_adapter(tmp_path / "adapter", CONFIG, {}, {}, base_of("tiny", tiny[1]))
    again = load_adapter(tmp_path / "adapter", base_of("tiny", tiny[1]))
    assert again.frozen == again.trainable == {}
    same(with_adapter(tmp_path / "adapter", "tiny", tiny[1]), tiny[1])


def test_the_model_with_it_gives_the_logits_of_training(tiny, folder):
    model, params = tiny
    tokens = jnp.arange(12, dtype=jnp.int32)[None, :]
    attached = attach(make_adapter(CONFIG), params, *values(params))
    merged = with_adapter(folder, "tiny.gguf", params)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    expected = model.apply({"params": attached}, tokens).logits
    np.testing.assert_allclose(model.apply({"params": merged}, tokens).logits, expected, atol=1e-4, rtol=0)
    assert np.abs(model.apply({"params": params}, tokens).logits - expected).max() > 0.1


def test_it_holds_no_copy_of_the_model(tiny, folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 60_000
    assert sum(x.nbytes for x in jax.tree.leaves(tiny[1])) > 80_000


def test_another_model_is_refused(tiny, folder):
    flat = flatten_dict(tiny[1])
    path = ("layers_1", "mlp", "up", "kernel")
    other = tiny[1] | {"layers_1": tiny[1]["layers_1"] | {"mlp": tiny[1]["layers_1"]["mlp"] | {
        "up": {"kernel": flat[path].at[3, 4].multiply(1.01)}}}}  # fmt: skip
    with pytest.raises(InputError, match=r"belongs to 'tiny.gguf' \(content \w{12}\), not to 'other' \(content"):
        with_adapter(folder, "other", other)


def test_the_hash_sees_values_places_names_and_shapes_and_no_dtype():
    x = jax.random.normal(jax.random.key(0), (6, 8))
    others = [
        {"a": x.at[5, 7].multiply(1.01)},
        {"a": x[::-1]},
        {"a": x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])},
        {"a": x.reshape(8, 6)},
        {"b": x},
        {"a": x, "b": x},
        {"a": jnp.zeros((6, 8))},
        {"a": jnp.zeros((6, 9))},
    ]
    hashes = [content_hash({"a": x}), *map(content_hash, others)]
    assert len(set(hashes)) == len(hashes) and all(len(h) == 64 for h in hashes)
    assert content_hash({"a": x.astype(jnp.bfloat16)}) == hashes[0]


def test_the_hash_is_that_of_any_sharding():
    x = jax.random.normal(jax.random.key(0), (6, 8))
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
    assert content_hash({"a": spread}) == content_hash({"a": x})


def test_the_next_save_replaces_the_last(tiny, folder):
    new = dataclasses.replace(CONFIG, rank=2)
    save_adapter(folder, new, *values(tiny[1], new), base_of("tiny.gguf", tiny[1]))
    assert load_adapter(folder, base_of("tiny.gguf", tiny[1])).config.rank == 2
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_folder_of_something_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        save_adapter(tmp_path, CONFIG, *values(tiny[1]), Base("tiny", ""))
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_adapter(tmp_path / "file" / "adapter", CONFIG, *values(tiny[1]), Base("tiny", ""))


def test_a_disk_that_fills_up_leaves_the_last_adapter(tiny, folder):
    """No file may grow beyond 4 kB for the while: what is written fails as it does on a full disk."""
    base = base_of("tiny.gguf", tiny[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write"):
            save_adapter(folder, CONFIG, *values(tiny[1], seed=1), base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    same(load_adapter(folder, base).trainable, values(tiny[1])[1])


def edit(folder, **changes):
    about = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(about | changes))


DAMAGE = {
    "no adapter": (lambda f: (f / CONFIG_NAME).unlink(), "holds no adapter"),
    "newer format": (lambda f: edit(f, format=2), "has format 2; this version reads 1"),
    "unknown method": (lambda f: edit(f, adapter={"type": "lorra"}), "unknown adapter 'lorra'. Did you mean 'lora'"),
    "no method": (lambda f: edit(f, adapter=None), "unknown adapter None"),
    "bad setting": (lambda f: edit(f, adapter={"type": "lora", "rank": "x"}), "adapter.json is damaged"),
    "no base": (lambda f: edit(f, base={}), "adapter.json is damaged"),
    "no values": (lambda f: shutil.rmtree(f / "values"), "values is not a readable checkpoint"),
    "cut values": (
        lambda f: [p.write_bytes(b"") for p in (f / "values").rglob("*") if p.is_file()],
        "values is not a readable checkpoint",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders(what, tiny, folder):
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_adapter(folder, base_of("tiny.gguf", tiny[1]))


def test_frozen_values_are_kept(tiny, tmp_path):
    """Those of methods that freeze factors: without values for some modules, and of other dtypes."""
    frozen, trainable = values(tiny[1])
    path = next(iter(frozen))
    frozen = frozen | {path: {"seed": jnp.array([1, 2], jnp.uint32), "core": jnp.ones((3,), jnp.bfloat16)}}
    base = base_of("tiny", tiny[1])
    save_adapter(tmp_path / "m", CONFIG, frozen, trainable, base)
    same(load_adapter(tmp_path / "m", base).frozen, frozen)
    assert saved.CONFIG_NAME in {p.name for p in (tmp_path / "m").iterdir()}
