"""Runs that need more devices or processes than a test has: `start` runs a function of this file in new processes.

Each prints one line of JSON, which comes back to the test. The same functions run in a test's own process, on one
device, for what the others are compared with.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from finetune.adapters import LoraConfig, make_adapter
from finetune.adapters.adapter import LINEAR, rebase, select
from finetune.distributed import DistributedConfig, global_batch, initialize, is_main, row_share
from finetune.objectives import cross_entropy
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.state import Batch, Constants, TrainState, adapter_tuning, full_tuning, new_state
from finetune.trainer import make_train_step, train
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, MoEConfig
from models.decoder import Decoder
from models.sharding import MeshConfig, abstract, build, make_mesh, place

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"  # compiles fast
ROWS, LENGTH, STEPS = 8, 12, 3
TIMEOUT = 300.0  # seconds; a busy machine takes ten times what an idle one does


def free_address() -> str:
    """Returns "localhost:port" with a port that is free now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(name: str, arguments: list[dict[str, Any]], devices: int) -> list[Any]:
    """Returns what function `name` gave in each of several processes, one for each dict of arguments."""
    flags = {"XLA_FLAGS": FLAGS.format(devices=devices), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(index) for index in range(len(arguments))]
        processes = []
        for values, log in zip(arguments, logs, strict=True):
            command = [sys.executable, "-m", "tests.support.scale", name, json.dumps(values)]
            with log.open("w") as out:
                environment = {**os.environ, **flags}
                processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out))
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and {process.poll() for process in processes} <= {None, 0}:
            if all(process.poll() == 0 for process in processes):
                break
            time.sleep(0.05)
        for process in processes:  # where one fails, the others would wait for it
            process.kill()
            process.wait()
        texts = [log.read_text() for log in logs]
    assert all(process.returncode == 0 for process in processes), "\n\n".join(texts)
    return [json.loads(text.splitlines()[-1]) for text in texts]


def small_model(remat: bool = False, experts: bool = False) -> Decoder:
    """Returns a model of one layer with grouped heads, and with experts if so: many are compiled."""
    mlp = MoEConfig(4, 2, MLPConfig(12), form="dense", balance_weight=0.1) if experts else MLPConfig(24)
    block = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4), mlp)
    return Decoder(DecoderConfig("llama", vocab_size=64, width=16, blocks=(block,), max_length=64), remat)


class Run:
    """A training run of the tiny model on a mesh, or without one on one device.

    `tuning` is "lora", "full", or "experts": in full, with a mixture of experts.
    """

    def __init__(self, mesh: jax.sharding.Mesh | None, tuning: str):
        self.mesh = mesh
        model = small_model(remat=True, experts=tuning == "experts")
        params = self._made(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], jax.random.key(0))
        if tuning != "lora":
            method = full_tuning(jax.tree.map(lambda leaf: leaf.dtype, params))
            base, frozen, trainable = {}, {}, params
        else:
            adapter = make_adapter(LoraConfig(rank=4))
            frozen, trainable = self._made(lambda p: adapter.init(jax.random.key(1), select(p, LINEAR), None), params)
            method, base = adapter_tuning(adapter), rebase(adapter, params, frozen)
        config = OptimizerConfig(learning_rate=3e-2, weight_decay=0.1)
        optimizer = make_optimizer(config, STEPS, method)
        objective = cross_entropy(1e-3)
        self.constants = Constants(base, frozen, objective.constants)
        self.first = self._made(lambda values: new_state(values, optimizer), trainable)
        self.step = make_train_step(model, objective, method, optimizer, learning_rate(config, STEPS), mesh)

    def _made(self, function: Any, *args: Any) -> Any:
        return jax.jit(function)(*args) if self.mesh is None else build(function, *args, mesh=self.mesh)

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, two micro-batches of uneven texts; each process makes its own rows."""
        if self.mesh is None:
            return rows_of(step, range(ROWS))
        index, count = row_share(self.mesh)
        share = ROWS // count
        return global_batch(rows_of(step, range(index * share, (index + 1) * share)), self.mesh)

    def go(self, state: TrainState | None = None, steps: int = STEPS) -> tuple[list[float], TrainState]:
        """Returns (losses, state) of the updates up to `steps`."""
        losses: list[float] = []
        state = self.first if state is None else state
        state = train(
            self.step, state, self.constants, self.batch, steps, lambda _, figures: losses.append(figures["loss"])
        )
        return losses, state


def rows_of(step: int, rows: range) -> Batch:
    """Returns [2, rows, LENGTH] of a step's batch, the same whichever rows are asked for together."""
    made = [np.random.default_rng((step, row)).integers(1, 61, (2, 1, LENGTH), dtype=np.int32) for row in rows]
    tokens = np.concatenate(made, axis=1)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[None, None, :], tokens.shape)
    first = 5 + np.asarray(rows, np.int32)[None, :, None] % 4  # tokens of the first text of a row, then a second
    last = LENGTH - np.asarray(rows, np.int32)[None, :, None] % 3  # from here on padding
    segments = np.where(places < last, 1 + (places >= first), 0).astype(np.int32)
    return Batch(tokens, (segments > 0) & (tokens % 7 > 0), segments, np.where(places < first, places, places - first))


def mesh_losses(runs: list[tuple[list[int], str]], folder: str) -> list[dict[str, Any]]:
    """Trains on each of several [sizes of a mesh, tuning]; says how the state was split, and what was compiled.

    `folder`/i is the state of run i after its first update.
    """
    initialize(DistributedConfig())
    found = []
    for index, (sizes, tuning) in enumerate(runs):
        run = Run(make_mesh(MeshConfig(*sizes)), tuning)
        before = jax.tree.map(lambda leaf: leaf.sharding, run.first)
        losses, state = run.go(steps=1)
        save(f"{folder}/{index}", state)
        rest, state = run.go(state)
        kept = jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, before)
        leaves = jax.tree.leaves(state)
        found.append(
            {
                "losses": losses + rest,
                "kept": all(jax.tree.leaves(kept)),
                "compiled": run.step._cache_size(),
                "share": sum(leaf.addressable_shards[0].data.size for leaf in leaves)
                / sum(leaf.size for leaf in leaves),
            }
        )
    return found


def process_losses(coordinator: str, process_id: int, meshes: list[list[int]], folder: str) -> list[dict[str, Any]]:
    """Trains as one of two processes on each of several meshes; saves and restores on the way."""
    initialize(DistributedConfig(coordinator, 2, process_id))
    found = []
    for number, mesh in enumerate(meshes):
        run = Run(make_mesh(MeshConfig(*mesh)), "lora")
        losses, state = run.go(steps=1)
        save(f"{folder}/{number}", state)
        losses += run.go(restore(f"{folder}/{number}", run))[0]
        whole = {"q": {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8)}}
        for _ in range(2):  # what is spread already can be placed once more
            whole = place(whole, run.mesh)
        found.append(
            {
                "losses": losses,
                "main": is_main(),
                "devices": [jax.local_device_count(), jax.device_count()],
                "share": list(row_share(run.mesh)),
                "placed": float(jnp.square(whole["q"]["kernel"]).sum()),
            }
        )
    return found


def trained(coordinator: str, process_id: int, runs: list[list[str]]) -> int:
    """Goes through training runs, each a command line's flags, as one of two processes; returns which."""
    from experiments import train

    for flags in runs:
        joined = ["--distributed.coordinator", coordinator, "--distributed.num_processes", "2"]
        sys.argv = ["train", *flags, *joined, "--distributed.process_id", str(process_id)]
        train.main()
    return jax.process_index()


def save(folder: str, state: TrainState) -> None:
    """Writes a state with orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder), state)


def restore(folder: str, run: Run) -> TrainState:
    """Reads a state into a run's own places, whatever the mesh that it was written from."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder), abstract(run.first, run.mesh))


def resumed(folder: str, mesh: list[int], tuning: str) -> list[float]:
    """Goes on from a saved state on a mesh, and returns the losses."""
    run = Run(make_mesh(MeshConfig(*mesh)), tuning)
    return run.go(restore(folder, run))[0]


def decoded(mesh: list[int] | None) -> dict[str, Any]:
    """Decodes a ragged batch with the small model, on a mesh or without one."""
    from decoding import make_decode_fn

    model = small_model()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: leaf * 12.0 if leaf.ndim == 2 else leaf, params)
    params = params if mesh is None else place(params, make_mesh(MeshConfig(*mesh)))
    prompts = [[(7 * row + place) % 61 for place in range(2 + 3 * row)] for row in range(4)]
    found = {}
    for method, options in (("greedy", {}), ("token_recycling", {"width": 20})):
        decode_fn = make_decode_fn(model, method, max_new_tokens=10, **options)
        out = decode_fn(params, prompts, max_new_tokens=[10, 4, 7, 10])
        found[method] = [row[:length] for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]
        if out.warm is not None:
            found["warm"] = decode_fn(params, prompts, warm=out.warm).stats.steps.tolist()
    return found


SPARSE = {
    "tidal": {"budget": 5, "select": (0,)},
    "lserve": {"budget": 12, "page": 4, "logical": 2, "gates": ((0.9, 0.1), (0.2, 0.8)), "sink": 1, "local": 4},
    "streaming": {"sink": 2, "local": 4},
    "core_infer": {"first": 0, "last": 1},
}


def decoded_sparsely(mesh: list[int] | None) -> dict[str, list[list[int]]]:
    """Decodes a ragged batch with every sparse method, two layers deep, on a mesh or without one."""
    from decoding import make_decode_fn

    config = small_model().config
    model = Decoder(dataclasses.replace(config, blocks=config.blocks * 2))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: leaf * 12.0 if leaf.ndim == 2 else leaf, params)
    params = params if mesh is None else place(params, make_mesh(MeshConfig(*mesh)))
    prompts = [[(7 * row + place * place) % 61 for place in range(9 + 3 * row)] for row in range(4)]
    found = {}
    for method, options in {"greedy": {}, **SPARSE}.items():
        out = make_decode_fn(model, method, max_new_tokens=10, **options)(
            params, prompts, max_new_tokens=[10, 4, 7, 10]
        )
        found[method] = [row[:length] for row, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True)]
    return found


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
