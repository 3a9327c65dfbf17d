"""Configs: what they refuse, and that JSON gives back an equal config for every family variant."""

import dataclasses
import json

import pytest

from models.config import AttentionConfig, MLPConfig, RopeScaling, config_from_dict, config_to_dict
from models.errors import InputError, unknown_name
from models.families import FAMILIES, family_of
from tests.support.tiny_models import CONFIGS, ENCODER_DECODERS


def read(name):
    return family_of(CONFIGS[name]).read_config(CONFIGS[name])


def test_every_family_has_a_tiny_config():
    assert {family_of(config).name for config in (CONFIGS | ENCODER_DECODERS).values()} | {"yi"} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_json(name):
    config = read(name)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config and hash(again) == hash(config)
    assert again.num_layers == CONFIGS[name].get("num_hidden_layers", CONFIGS[name].get("n_layer"))


def test_readers_keep_what_tells_variants_apart():
    windows = [block.attention.window for block in read("qwen2_sliding").blocks]
    assert windows == [None, 4, 4]
    gemma = read("gemma3")
    assert [block.attention.window for block in gemma.blocks] == [5, 5, None, 5]
    assert [block.attention.rope.theta for block in gemma.blocks] == [100.0, 100.0, 5000.0, 100.0]
    assert gemma.blocks[2].attention.rope.scaling == RopeScaling("linear", 2.0, original_length=64)
    assert gemma.blocks[0].attention.scale == pytest.approx(24**-0.5)
    assert gemma.logit_softcap == 3.0 and gemma.embedding_scale == pytest.approx(32**0.5)
    assert read("llama_yarn").blocks[0].attention.rope.scaling == RopeScaling("yarn", 4.0, original_length=16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3, "head_dim": 8}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"num_heads": 4, "num_kv_heads": 0, "head_dim": 8}, "num_kv_heads 0"),
        ({"num_heads": 4, "num_kv_heads": 2, "head_dim": 7}, "even head_dim, got 7"),
    ],
)
def test_attention_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        AttentionConfig(**arguments)


def test_odd_head_width_is_fine_without_rotation():
    assert AttentionConfig(2, 1, 7, rope=None).head_dim == 7


def edited(path, value):
    """The values of the llama config with one of them replaced, or dropped where `value` is `...`."""
    values = json.loads(json.dumps(config_to_dict(read("llama_llama3"))))
    *parents, last = path
    place = values
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        (("vocab_size",), ..., "vocab_size"),
        (("vocab_size",), "many", "vocab_size.*'many'"),
        (("width",), 1.5, "width.*1.5"),
        (("blocks",), 3, "blocks.*3"),
        (("blocks", 1, "mlp", "activation"), "tanh", r"blocks\.1\.mlp\.activation.*'silu'.*'tanh'"),
        (("blocks", 2, "attention", "window"), "wide", r"blocks\.2\.attention\.window.*'wide'"),
        (("blocks", 0, "attention", "rope", "scaling", "kind"), "ntk", r"blocks\.0\.attention\.rope\.scaling\.kind"),
        (("blocks", 0, "attention", "num_kv_heads"), 3, r"blocks\.0\.attention.*multiple of num_kv_heads 3"),
        (("norm", "kind"), "batch", r"norm\.kind.*'batch'"),
    ],
)
def test_bad_values_are_named_by_their_path(path, value, shown):
    with pytest.raises(InputError, match=f"model config: {shown}"):
        config_from_dict(edited(path, value))


@pytest.mark.parametrize("values", [{}, None, [], 3])
def test_values_that_are_no_config(values):
    with pytest.raises(InputError, match="model config"):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'. Did you mean 'llama'"),
        ({"model_type": None}, "unknown model_type"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_act": "swiglu"}, "activation 'swiglu' is not supported; supported: silu"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rotary scaling 'longrope' is not supported"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads 3"),
    ],
)
def test_bad_hugging_face_configs(change, message):
    config = {**CONFIGS["llama"], **change}
    with pytest.raises(InputError, match=message):
        family_of(config).read_config(config)


@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        (("top_k",), "two", r"blocks\.0\.mlp\.top_k: .*got 'two'"),
        (("expert", "activation"), "tanh", r"blocks\.0\.mlp\.expert\.activation: .*got 'tanh'"),
    ],
)
def test_bad_values_of_a_mixture_are_named_by_their_path(path, value, shown):
    values = config_to_dict(read("mixtral"))
    place = values["blocks"][0]["mlp"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(InputError, match=f"model config: {shown}"):
        config_from_dict(values)


def test_both_spellings_of_rotary_scaling_agree():
    old = CONFIGS["llama_llama3"]
    scaling, theta = old["rope_scaling"], old["rope_theta"]
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**scaling, "rope_theta": theta}
    assert family_of(new).read_config(new) == read("llama_llama3")


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MLPConfig(4).width = 5


@pytest.mark.parametrize(
    ("seen", "hint"),
    [
        ("qwen", "Did you mean 'qwen"),
        ("lama", "Did you mean 'llama'?"),
        ("zzz", "unknown family 'zzz'. Known: gemma3, "),
    ],
)
def test_unknown_name(seen, hint):
    error = unknown_name("family", seen, FAMILIES)
    assert isinstance(error, InputError) and isinstance(error, ValueError)
    assert hint in str(error) and "gpt2, llama" in str(error)
