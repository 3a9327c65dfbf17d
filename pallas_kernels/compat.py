"""The Pallas names that moved between jax 0.10 and 0.12, and how each backend is asked for.

Every kernel here takes these names from this module alone; a release that moves one again is mended in one place. What
has kept its name (`pallas_call`, `BlockSpec`, `program_id`, `when`) kernels take from `jax.experimental.pallas`.
"""

from typing import Any

from jax.experimental.pallas import tpu as _tpu
from jax.experimental.pallas import triton as _triton

PrefetchScalarGridSpec = _tpu.PrefetchScalarGridSpec
VMEM = _tpu.VMEM

Interpret = bool | _tpu.InterpretParams


def tpu_params(*semantics: str) -> Any:
    """Returns `compiler_params` for the TPU backend.

    Args:
        semantics: one word per grid axis: "parallel" where steps may run in any order or on another core, "arbitrary"
            where they run in order.
    """
    return _tpu.CompilerParams(dimension_semantics=semantics)


def gpu_params(num_warps: int, num_stages: int) -> Any:
    """Returns `compiler_params` for the Triton backend.

    Without them, `pallas_call` on a GPU means another backend in each release of jax.

    Args:
        num_warps: groups of 32 threads per program, a power of two.
        num_stages: how many steps of a loop have their loads under way at once.
    """
    return _triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def tpu_interpreter() -> _tpu.InterpretParams:
    """Returns the `interpret` value that simulates a TPU of two cores on a CPU.

    Unwritten memory reads as NaN, and accesses of one place that nothing orders are reported as races on the standard
    output.
    """
    return _tpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
