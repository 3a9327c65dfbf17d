"""A strict world for every test: no silent rank or dtype promotion, warnings are errors (pyproject.toml), several CPU
devices. XLA compiles with little effort: compilation is most of the time of these tests.
"""

import os
from importlib.metadata import version

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    "--xla_disable_hlo_passes=constant_folding "  # of the many rows that a law is tested with
    "--xla_cpu_parallel_codegen_split_count=1"  # a worker of pytest for each core already
    # Later versions end the process at a flag that they no longer know.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, RopeConfig
from models.decoder import Decoder
from models.errors import InputError
from models.weights.load import LoadedModel, load_model

# What is compiled once need not be compiled again, in this run or the next; each worker keeps its own.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla" / os.environ.get("PYTEST_XDIST_WORKER", "main")
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_code():
    """Frees what a file's tests compiled: a process has only so many memory maps, and each program takes some."""
    yield
    jax.clear_caches()


def tiny_config() -> DecoderConfig:
    """Three layers, grouped heads, the middle layer with a sliding window of 6."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig(100.0))
    block = BlockConfig(attention, MLPConfig(48))
    local = dataclasses.replace(block, attention=dataclasses.replace(attention, window=6))
    return DecoderConfig("llama", vocab_size=61, width=32, blocks=(block, local, block), max_length=256)


@pytest.fixture(scope="session")
def tiny() -> tuple[Decoder, dict]:
    """(model, params) of a random three-layer model whose greedy text is varied."""
    model = Decoder(tiny_config())
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: x * 12.0 if x.ndim == 2 else x, params)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The default real model (98 MB, fetched on first use); skips where it cannot be fetched, but never in CI."""
    try:
        return load_model("smollm2-135m-instruct")
    except InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the default model is not here and cannot be fetched: {error}")
