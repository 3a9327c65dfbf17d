"""Many devices and several processes give the losses of one device."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from finetune.adapters.svd import truncated_svd
from finetune.distributed import DistributedConfig, check_rows, global_batch, initialize, row_share
from models.errors import InputError
from models.sharding import MeshConfig, abstract_mesh, make_mesh, place
from tests.support.scale import ROWS, STEPS, Run, free_address, restore, rows_of, save, start

MESHES = [((8, 1, 1), "lora"), ((2, 2, 2), "lora"), ((1, 2, 4), "full"), ((2, 1, 1, 4), "experts")]
SHARES = [1.0, 0.8, 0.15, 0.75]  # of the state's numbers, on one device at most


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    """The losses of one device without a mesh."""
    return {tuning: Run(None, tuning).go()[0] for tuning in ("lora", "full", "experts")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs on eight devices leave their states."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def on_eight(folder) -> list[dict]:
    (found,) = start("mesh_losses", [{"runs": MESHES, "folder": str(folder)}], devices=8)
    return found


@pytest.mark.parametrize("index", range(len(MESHES)), ids=[str(mesh) for mesh in MESHES])
def test_eight_devices_give_the_losses_of_one(index, alone, on_eight):
    assert len(set(alone["lora"])) == STEPS  # it trains: equal losses say something
    np.testing.assert_allclose(on_eight[index]["losses"], alone[MESHES[index][1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("index", range(len(MESHES)), ids=[str(mesh) for mesh in MESHES])
def test_a_state_stays_where_it_is_and_compiles_once(index, on_eight):
    assert on_eight[index]["kept"] and on_eight[index]["compiled"] == 1
    assert on_eight[index]["share"] <= SHARES[index]


def test_two_processes_give_the_losses_of_one(alone, tmp_path):
    arguments = {"coordinator": free_address(), "meshes": [[2, 2, 1], [1, 1, 4]], "folder": str(tmp_path)}
    both = start("process_losses", [arguments | {"process_id": index} for index in range(2)], devices=2)
    for index, found in enumerate(both):
        assert [run["share"] for run in found] == [[index, 2], [0, 1]]  # rows of its own; the rows of both
        for run in found:
            np.testing.assert_allclose(run["losses"], alone["lora"], atol=1e-5, rtol=0)
            assert run["main"] == (index == 0) and run["devices"] == [2, 4]
            assert run["placed"] == sum(value**2 for value in range(64))
    run = Run(None, "lora")  # what two processes wrote, one device reads
    np.testing.assert_allclose(run.go(restore(str(tmp_path / "0"), run))[0], alone["lora"][1:], atol=1e-5, rtol=0)


def test_a_checkpoint_of_eight_devices_goes_on_on_one_and_back(alone, on_eight, folder, tmp_path):
    run = Run(None, "full")
    middle, state = run.go(restore(str(folder / "2"), run), 2)
    save(str(tmp_path / "state"), state)
    ended = start("resumed", [{"folder": str(tmp_path / "state"), "mesh": [2, 2, 2], "tuning": "full"}], devices=8)
    np.testing.assert_allclose([*middle, *ended[0]], alone["full"][1:], atol=1e-5, rtol=0)


def test_a_process_alone_joins_nobody():
    jax.devices()  # as in a notebook; `mesh_losses` asks in a new process
    initialize(DistributedConfig())
    initialize(DistributedConfig(num_processes=1))
    assert not jax.distributed.is_initialized()


def test_an_environment_that_names_processes_in_part_is_told(monkeypatch):
    def fail() -> None:
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError, match="Number of processes must be defined.*give coordinator.*num_processes 1"):
        initialize(DistributedConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "a:1"}, "go together: give all three .* got 'a:1', None, None"),
        ({"num_processes": 2, "process_id": 0}, "go together"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id must be 0 to .* is 1; got 2"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be host:port.* got 'a'"),
    ],
)
def test_flags_that_do_not_name_the_processes_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        DistributedConfig(**values)


def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    mesh = abstract_mesh(MeshConfig(2, 2, 3))
    check_rows(8, mesh)
    with pytest.raises(
        InputError, match=r"6 rows does not divide .* 4 groups .*data 2 x fsdp 2 x expert 1\): take 4 or 8 rows"
    ):
        check_rows(6, mesh)
    with pytest.raises(InputError, match="take 4 rows"):
        check_rows(3, mesh)


def test_one_process_reads_all_rows():
    mesh = make_mesh(MeshConfig(2, 1, 1))
    assert row_share(mesh) == (0, 1)
    batch = rows_of(0, range(ROWS))
    whole = global_batch(batch, mesh)
    np.testing.assert_array_equal(whole.tokens, batch.tokens)
    assert {shard.data.shape[1] for shard in whole.tokens.addressable_shards} == {ROWS // 2}


def test_singular_vectors_of_a_kernel_that_is_spread():
    kernel = jax.random.normal(jax.random.key(0), (8, 12))
    spread = place({"q": {"kernel": kernel}}, make_mesh(MeshConfig(1, 1, 2)))["q"]["kernel"]
    for found, wanted in zip(truncated_svd(spread, 3), truncated_svd(kernel, 3), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def mesh_of_processes(processes: list[int], data: int, fsdp: int, tensor: int) -> SimpleNamespace:
    """What `row_share` asks of a mesh: the devices in order, here only the processes that they belong to."""
    devices = np.array([SimpleNamespace(process_index=process) for process in processes]).reshape(data, fsdp, 1, tensor)
    return SimpleNamespace(devices=devices, shape={"data": data, "fsdp": fsdp, "expert": 1, "tensor": tensor})


@pytest.mark.parametrize(
    ("processes", "sizes", "share"),
    [
        ([0, 0, 1, 1], (4, 1, 1), (0, 2)),
        ([1, 1, 0, 0], (2, 2, 1), (1, 2)),
        ([0, 1, 0, 1], (2, 2, 1), (0, 2)),  # a pod's topology may interleave its hosts
        ([0, 1, 2, 3], (2, 1, 2), (0, 2)),
        ([0, 0, 1, 1], (1, 1, 4), (0, 1)),
    ],
)
def test_each_process_reads_rows_of_its_own(processes, sizes, share):
    assert row_share(mesh_of_processes(processes, *sizes)) == share


@pytest.mark.parametrize(("processes", "sizes"), [([0, 0, 0, 1], (2, 1, 2)), ([0, 1, 1, 1], (4, 1, 1))])
def test_a_mesh_that_cuts_across_processes_is_refused(processes, sizes):
    with pytest.raises(
        InputError, match=f"data {sizes[0]} x fsdp 1 x expert 1 x tensor {sizes[2]} cuts across its 2 processes"
    ):
        row_share(mesh_of_processes(processes, *sizes))
