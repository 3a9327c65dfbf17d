"""Which form of an operation runs: plain XLA, the TPU kernel or the GPU kernel.

`impl` is "xla", "pallas" or "auto". "auto" takes a kernel only where `PALLAS_FROM` says that it was measured to be
faster than XLA's own program; on a CPU that is nowhere. "pallas" insists, and refuses what no kernel serves.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import Interpret

IMPLS = ("auto", "pallas", "xla")
KERNEL_DTYPES = ("float32", "bfloat16")
KERNEL_HEAD_DIMS = (64, 128, 256)
LEAST_SLOTS = 128  # the smallest block of a TPU kernel, in slots

# (operation, platform): the least number of slots from which the kernel was measured to be faster. None was measured.
PALLAS_FROM: dict[tuple[str, str], int] = {}


def platform() -> str:
    """Returns the kind of device that programs run on by default: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def choose_form(operation: str, impl: str, interpret: Interpret, num_slots: int, unserved: str | None) -> str:
    """Returns the form to run: "xla", "tpu" or "gpu".

    Args:
        operation: the operation's name in `PALLAS_FROM`.
        impl: "auto", "pallas" or "xla".
        interpret: run the kernel in Python's hands, for tests on a CPU (the TPU form unless the platform is a GPU).
        num_slots: S, the slots of the cache.
        unserved: why no kernel serves these operands, or None when one does.

    Raises:
        ValueError: an unknown `impl`; "pallas" where no kernel runs; `interpret` without "pallas".
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}.")
    if interpret and impl != "pallas":
        raise ValueError(f"interpret=True with impl={impl!r}: only a kernel can be interpreted. Pass impl='pallas'.")
    device = platform()
    if impl == "auto":
        least = PALLAS_FROM.get((operation, device))
        impl = "xla" if least is None or num_slots < least or unserved else "pallas"
    if impl == "xla":
        return "xla"
    if unserved:
        raise ValueError(f"{operation} has no kernel for {unserved}. Pass impl='auto' or impl='xla'.")
    if device in ("tpu", "gpu"):
        return device
    if not interpret:
        raise ValueError(f"{operation} has no kernel for the platform {device!r}. Pass impl='auto', or interpret=True.")
    return "tpu"


def kernel_wins(operation: str, dtype: jnp.dtype, head_dim: int, num_slots: int) -> bool:
    """Tells whether "auto" takes a kernel for an attention operation on a cache of this kind."""
    return choose_form(operation, "auto", False, num_slots, unserved_by_kernels(dtype, head_dim, num_slots)) != "xla"


def unserved_by_kernels(dtype: jnp.dtype, head_dim: int, num_slots: int) -> str | None:
    """Returns why no attention kernel serves such a cache ("dtype float16 (...)"), or None when one does."""
    if str(dtype) not in KERNEL_DTYPES:
        return f"dtype {dtype} (it must be one of {', '.join(KERNEL_DTYPES)})"
    if head_dim not in KERNEL_HEAD_DIMS:
        return f"head width {head_dim} (it must be one of {', '.join(map(str, KERNEL_HEAD_DIMS))})"
    if num_slots < LEAST_SLOTS:
        return f"{num_slots} slots (it needs at least {LEAST_SLOTS})"
    return None


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless the array has this shape, which the other arguments fix; `axes` names it ("B, K, S")."""
    if value.shape != shape:
        raise ValueError(f"{name} has the shape {value.shape}; with the other arguments [{axes}] must be {shape}.")


def check_integers(name: str, value: jax.Array) -> None:
    """Raises ValueError unless the array holds int32."""
    if value.dtype != jnp.int32:
        raise ValueError(f"{name} has the dtype {value.dtype}; it must be int32.")


def check_one_dtype(**values: jax.Array) -> None:
    """Raises ValueError unless all the arrays have one floating dtype."""
    dtypes = {name: str(value.dtype) for name, value in values.items()}
    floating = all(jnp.issubdtype(value.dtype, jnp.floating) for value in values.values())
    if len(set(dtypes.values())) > 1 or not floating:
        seen = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"the dtypes are {seen}; they must be one floating dtype. Cast the queries to the cache's.")


def check_lengths(lengths: jax.Array, num_slots: int) -> None:
    """Raises ValueError when a length that is known now is negative or beyond the cache's `num_slots` slots.

    Inside a jitted function the lengths are not known; there the caller keeps them in range.
    """
    if isinstance(lengths, jax.core.Tracer):
        return
    seen = np.asarray(lengths)
    wrong = seen[(seen < 0) | (seen > num_slots)]
    if wrong.size:
        raise ValueError(
            f"lengths holds {int(wrong[0])}; every length must be from 0 to the cache's {num_slots} slots."
        )


def check_below(name: str, value: jax.Array, count: int, what: str) -> None:
    """Raises ValueError when a number that is known now is not below the cache's `count` of `what`.

    Inside a jitted function the numbers are not known; there the caller keeps them in range.
    """
    if isinstance(value, jax.core.Tracer) or not value.size:
        return
    most = int(np.asarray(value).max())
    if most >= count:
        raise ValueError(f"{name} holds {most}; every number must be below the cache's {count} {what}.")
