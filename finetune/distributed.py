"""Several processes as one machine: JAX's own multi-controller runtime, and batches made of every process's rows.

Every process runs the same program on the same global arrays. What differs is which rows of a batch it reads
(`row_share`) and who writes logs (process 0).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from models.errors import InputError
from models.sharding import AXES, ROWS, num_row_shards


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Which processes train together. Nothing needs to be said on one machine, on TPU pods, under Slurm and Open MPI.

    Attributes:
        coordinator: "host:port" of process 0, on any free port of it.
        num_processes: how many there are; 1 keeps a process to itself where it would find others.
        process_id: this one's number, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.coordinator, self.num_processes, self.process_id)]
        if any(given) and not all(given) and self.num_processes != 1:
            raise InputError(
                "coordinator, num_processes and process_id go together: give all three (the same coordinator and "
                f"num_processes to every process) or none; got {self.coordinator!r}, {self.num_processes}, "
                f"{self.process_id}"
            )
        if all(given) and not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"process_id must be 0 to num_processes - 1, which is {self.num_processes - 1}; got {self.process_id}"
            )
        host, _, port = (self.coordinator or "host:1").rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"coordinator must be host:port, such as 10.0.0.1:1234; got {self.coordinator!r}")


def initialize(config: DistributedConfig) -> None:
    """Joins the other processes, if there are any, once; to be called before anything else asks JAX for a device.

    Where something has, and no processes are named (a notebook), this one trains alone.

    Raises:
        InputError: the environment names processes, but not all that is needed to join them.
    """
    if config.num_processes == 1 or jax.distributed.is_initialized():
        return
    if config.num_processes is not None:
        jax.distributed.initialize(
            config.coordinator, config.num_processes, config.process_id, cluster_detection_method="deactivate"
        )
        return
    try:
        jax.distributed.initialize()
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
    except ValueError as error:
        if "coordinator_address" not in str(error):  # that one says that no cluster was found
            raise InputError(
                f"cannot join the other processes: {error}; give coordinator, num_processes and process_id, or "
                "num_processes 1 to train alone"
            ) from error


def is_main() -> bool:
    """Whether this process is the one that writes logs and files."""
    return jax.process_index() == 0


def on_main(do: Callable[[], Any]) -> None:
    """Does something in the first process while the others wait; where it fails there, it fails everywhere.

    Raises:
        InputError: what `do` raised; in other processes, that the first one has said why.
    """
    failed: InputError | None = None
    if is_main():
        try:
            do()
        except InputError as error:
            failed = error
    if jax.process_count() > 1:
        stopped = multihost_utils.broadcast_one_to_all(np.asarray(failed is not None))
        if stopped and not is_main():
            raise InputError("the first process of the run has stopped, and its message says why")
    if failed is not None:
        raise failed


def check_rows(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises InputError where the rows of a micro-batch, counted over all processes, do not divide over the mesh."""
    shards = num_row_shards(mesh)
    if batch_size % shards:
        below = batch_size - batch_size % shards
        raise InputError(
            f"a batch of {batch_size} rows does not divide over the mesh, which spreads rows over {shards} groups of "
            f"devices ({_sizes(mesh, ROWS)}): take "
            f"{f'{below} or ' if below else ''}{below + shards} rows"
        )


def _sizes(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> str:
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)


def row_share(mesh: Mesh) -> tuple[int, int]:
    """Returns (i, n): the rows of a batch fall into n equal shares, and this process is to read share i.

    Processes whose devices hold the same rows (tensor-parallel ones) read the same share.

    Raises:
        InputError: the processes' rows overlap in part.
    """
    held = _row_shards(mesh)
    shares = sorted(set(held.values()))
    if sum(map(len, shares)) != num_row_shards(mesh) or len({len(share) for share in shares}) > 1:
        raise InputError(
            f"the mesh {_sizes(mesh, AXES)} cuts across its {len(held)} processes: choose sizes so that each process "
            "holds rows of its own, or all the rows that another one holds (tensor a divisor or a multiple of the "
            "devices of one process)"
        )
    return shares.index(held[jax.process_index()]), len(shares)


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns the batch of all processes: each passes the rows of its `row_share`, numpy arrays [A, B / n, ...].

    Where a row stands in the whole batch follows from the devices; every row is there once.

    Raises:
        InputError: the rows do not divide over the mesh, or the processes' rows overlap in part.
    """
    mine, shares = _row_shards(mesh)[jax.process_index()], row_share(mesh)[1]
    sharding = NamedSharding(mesh, P(None, ROWS))

    def whole(rows):
        num_rows = rows.shape[1] * shares
        check_rows(num_rows, mesh)
        each = rows.shape[1] // len(mine)

        def part(index):
            start = mine.index((index[1].start or 0) // each) * each
            return rows[:, start : start + each]

        return jax.make_array_from_callback((rows.shape[0], num_rows, *rows.shape[2:]), sharding, part)

    return jax.tree.map(whole, batch)


def _row_shards(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Returns which of the parts that rows are split into each process holds, in order."""
    held: dict[int, set[int]] = {}
    for part, devices in enumerate(mesh.devices.reshape(num_row_shards(mesh), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(part)
    return {process: tuple(sorted(parts)) for process, parts in held.items()}
