import optax
import pytest

from finetune.adapters import ADAPTERS, LoraConfig, make_adapter
from finetune.dry_run import adapter_shapes, dry_run, model_shapes, render
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from models.errors import InputError
from models.sharding import MeshConfig, abstract_mesh

BLOCK = BlockConfig(AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=64), MLPConfig(1536))
SMOLLM2 = Decoder(DecoderConfig("llama", 49152, 576, (BLOCK,) * 30, 8192, tied_embeddings=True))
COUNTS = [  # trained numbers on SmolLM2-135M, all linear layers of its blocks
    ("lora", {"rank": 8}, 2_442_240),
    ("lora", {"rank": 16}, 4_884_480),
    ("lora", {"rank": 8, "targets": ("q", "v")}, 460_800),
    ("lora_xs", {"rank": 16}, 53_760),
    ("lora_xs", {"rank": 32}, 215_040),
    ("lora_sb", {"rank": 16}, 53_760),
    ("lora_sb", {"rank": 32}, 215_040),
    ("sora", {"rank": 8}, 2_443_920),
    ("nola", {"bases": 64}, 26_880),
    ("lamda", {"rank": 32}, 5_191_680),
]


def report(config, mesh, optimizer=None):
    params, adapter = model_shapes(SMOLLM2), make_adapter(config)
    frozen, trainable = adapter_shapes(adapter, params, config.targets)
    return dry_run(params, frozen, trainable, optimizer or optax.adamw(1e-3), abstract_mesh(mesh))


@pytest.mark.parametrize(("name", "options", "count"), COUNTS, ids=[f"{row[0]}-{row[2]}" for row in COUNTS])
def test_trained_numbers_of_smollm2(name, options, count):
    found = report(ADAPTERS[name][0](**options), MeshConfig(1, 1, 1))
    assert (found.parameters, found.trained) == (134_515_008, count)
    assert found.optimizer == 2 * count + 1  # two moments, and the number of updates


def test_every_adapter_is_counted_or_says_why_not():
    assert {name for name, _, _ in COUNTS} == set(ADAPTERS) - {"lamda_plus_plus"}
    with pytest.raises(InputError, match="follows from its weights.*lamda of the same rank"):
        report(ADAPTERS["lamda_plus_plus"][0](rank=8), MeshConfig(1, 1, 1))


def test_each_device_holds_its_share():
    alone, spread = (report(LoraConfig(rank=8), mesh) for mesh in (MeshConfig(1, 1, 1), MeshConfig(4, 8, 3)))
    assert spread.mesh == {"data": 4, "fsdp": 8, "expert": 1, "tensor": 3} and spread.row_shards == 32
    base, shared = alone.parts[0], spread.parts[0]
    norms = 4 * 61 * 576
    assert base.device_bytes == base.bytes == shared.bytes == 4 * 134_515_008
    assert shared.device_bytes == norms + (base.bytes - norms) // 24
    assert spread.device_bytes == sum(part.device_bytes for part in spread.parts)
    (q,) = (array for array in shared.arrays if array.path == "layers_*/attention/q/kernel")
    assert (q.shape, q.axes, q.copies) == ((576, 576), ("fsdp", "tensor"), 30)
    assert q.device_bytes == 30 * 4 * 576 * 576 // 24


def test_full_tuning_keeps_one_copy_of_the_parameters_and_three_more_of_their_size():
    params = model_shapes(SMOLLM2)
    found = dry_run({}, {}, params, optax.adam(1e-3), abstract_mesh(MeshConfig(1, 2, 1)))
    assert found.parameters == found.trained == 134_515_008
    sizes = {part.name: part.bytes for part in found.parts}
    assert sizes["their gradients"] == sizes["trained values"] == 4 * 134_515_008
    assert sizes["optimiser state"] == 2 * sizes["trained values"] + 4


def test_the_report_can_be_read():
    text = render(report(LoraConfig(rank=8), MeshConfig(2, 2, 2)))
    lines = text.splitlines()
    assert lines[0] == "mesh: data 2 x fsdp 2 x expert 1 x tensor 2 = 8 devices; rows of a batch in 4 parts"
    assert lines[1] == "parameters 134,515,008; trained 2,442,240 (1.82%); optimiser state 4,884,481 numbers"
    row = next(line for line in lines if line.startswith("layers_*/attention/o/kernel (30)"))
    assert row.split()[2:] == ["576", "x", "576", "float32", "tensor,", "fsdp", "9.49"]
    assert any(line.split()[0:2] == ["all", "of"] for line in lines)
    assert max(map(len, lines)) < 120


def test_parameters_kept_in_bfloat16_take_half():
    params = model_shapes(SMOLLM2, "bfloat16")
    found = dry_run(params, {}, {}, optax.sgd(1e-3), abstract_mesh(MeshConfig(1, 1, 1)))
    assert found.parts[0].bytes == 2 * 134_515_008


def test_a_rank_that_a_layer_cannot_have_is_refused():
    with pytest.raises(InputError, match="rank 200 is larger"):
        report(LoraConfig(rank=200), MeshConfig(1, 1, 1))
