"""What the tests of kernels share: caches with garbage in dead slots, slow attention, lowering for absent devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.sharding import AbstractMesh

from pallas_kernels.flash_decode import Partials, normalize

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
GARBAGE = 1e30
_DEVICES = {"tpu": "TPU v5 lite", "cuda": "NVIDIA H100"}
_CALLS = {"tpu": "tpu_custom_call", "cuda": "triton"}


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def bury(x: jax.Array, lengths: jax.Array, garbage: float = GARBAGE) -> jax.Array:
    """Returns the cache x [B, K, S, Dh] with garbage in the dead slots."""
    dead = jnp.arange(x.shape[2])[None, :] >= lengths[:, None]
    return jnp.where(dead[:, None, :, None], jnp.asarray(garbage, x.dtype), x)


def slow_rows(
    q, k, v, lengths, first, scale: float, softcap: float | None, listed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns attention and log-sum-exp of q [B, K, R, Dh] in float64, row by row; (0, -inf) where nothing is seen.

    `listed` (bool[B, K, R, S]) hides all other slots.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, h, r in np.ndindex(q.shape[:3]):
        seen = np.arange(max(int(first[b, r]), 0), int(lengths[b]))
        seen = seen if listed is None else seen[listed[b, h, r, seen]]
        scores = k[b, h, seen] @ q[b, h, r] * scale
        if len(scores):
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            lse[b, h, r] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[b, h, r] = np.exp(scores - lse[b, h, r]) @ v[b, h, seen]
    return out, lse


def assert_part(part: Partials, out: np.ndarray, lse: np.ndarray, dtype: jnp.dtype) -> None:
    """Compares a part with what `slow_rows` gives: what it normalizes to, and the weight with which it would merge."""
    tolerance, seen = TOLERANCES[str(dtype)], np.isfinite(lse)
    assert all(x.dtype == jnp.float32 for x in part)
    np.testing.assert_allclose(normalize(part), out, atol=tolerance)
    np.testing.assert_array_equal(np.asarray(part.l) == 0, np.isinf(lse))
    np.testing.assert_allclose((part.m + jnp.log(part.l))[seen], lse[seen], rtol=tolerance, atol=tolerance)


def lower_for(platform: str, function: Callable, *shapes: jax.ShapeDtypeStruct) -> str:
    """Returns a function's program for "tpu" or "cuda", lowered from this host; fails unless it calls a kernel."""
    device = jax.sharding.AbstractDevice(_DEVICES[platform], 1, "tpu" if platform == "tpu" else "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert _CALLS[platform] in text
    return text


def races_found() -> bool:
    """Tells whether the last kernel run by `compat.tpu_interpreter` had a race."""
    return interpret_pallas_call.races.races_found
