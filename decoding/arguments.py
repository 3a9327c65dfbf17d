"""A call's arguments, checked and brought to one number per row.

Whatever is wrong about them is an InputError that gives the value seen and the values allowed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding.sampling import Sampling, row_keys
from models.errors import InputError, unknown_name


class Setting(NamedTuple):
    """A sampling setting: its default, its dtype, and what is allowed, in words and as a check."""

    default: float
    dtype: type
    allowed: str
    check: Callable[[np.ndarray], np.ndarray]


SETTINGS: dict[str, Setting] = {
    "temperature": Setting(0.0, np.float32, ">= 0 and finite", lambda x: (x >= 0) & np.isfinite(x)),
    "top_k": Setting(0, np.int32, ">= 0 (0 keeps all)", lambda x: x >= 0),
    "top_p": Setting(1.0, np.float32, "in (0, 1]", lambda x: (x > 0) & (x <= 1)),
    "min_p": Setting(0.0, np.float32, "in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
    "repetition_penalty": Setting(1.0, np.float32, "in [0.01, 100]", lambda x: (x >= 0.01) & (x <= 100)),
}


def read_sampling(given: Mapping[str, Any], batch: int, method: str, temperature: float | None) -> Sampling:
    """Returns the rows' sampling settings, defaults for those not given.

    `temperature` is the method's default; a method without one does not sample, and takes no settings.
    """
    for name in given:
        if name not in SETTINGS:
            raise unknown_name("sampling setting", name, SETTINGS)
        if temperature is None:
            raise InputError(f"method {method!r} takes no {name}: use method='sample'")
    if temperature is not None:
        given = {"temperature": temperature, **given}
    return Sampling(**read_settings(SETTINGS, given, batch))


def read_settings(table: Mapping[str, Setting], given: Mapping[str, Any], batch: int) -> dict[str, np.ndarray]:
    """Returns one number per row for each setting of a table, [B]; the defaults for those not given."""
    return {name: _read_setting(name, setting, given, batch) for name, setting in table.items()}


def _read_setting(name: str, setting: Setting, given: Mapping[str, Any], batch: int) -> np.ndarray:
    values = per_row(name, given.get(name, setting.default), batch, setting.dtype)
    if setting.dtype is np.int32:
        values = np.clip(values, np.iinfo(np.int32).min, np.iinfo(np.int32).max)
    with np.errstate(over="ignore"):
        values = values.astype(setting.dtype)
    if not np.all(setting.check(values)):
        raise InputError(f"{name} must be {setting.allowed}, got {given[name]}")
    return values


def read_limit(wanted: Any, batch: int, room: int) -> np.ndarray:
    """Returns the new tokens wanted per row, i32[B]; `room` is how many there can be."""
    limit = per_row("max_new_tokens", wanted, batch, np.int32)
    if limit.min() < 0 or limit.max() > room:
        raise InputError(
            f"max_new_tokens must be 0 to {room}, got {wanted}; "
            "for more, pass a larger max_new_tokens to make_decode_fn"
        )
    return limit.astype(np.int32)


def read_keys(rng: Any, batch: int) -> jax.Array:
    """Returns one random key per row from a seed or key for the batch, or from one per row."""
    if isinstance(rng, Sequence) and rng and all(_is_key(key) for key in rng):
        rng = jnp.stack(rng)
    if not _is_key(rng):
        seeds = _numbers(rng)
        if seeds is None or seeds.dtype.kind not in "iu" or seeds.ndim > 1 or seeds.size == 0:
            raise InputError(f"rng must be a whole number or a jax key, or one of them per row; got {rng!r:.80}")
        if isinstance(rng, jax.Array) and rng.dtype == jnp.uint32:
            raise InputError(
                "rng is an old-style key (uint32): use jax.random.key(seed) in place of jax.random.PRNGKey"
            )
        if seeds.min() < 0 or seeds.max() >= 2**32:
            raise InputError(f"rng must be seeds from 0 to {2**32 - 1}, got {rng!r:.80}")
        keys = [jax.random.key(seed) for seed in seeds.reshape(-1)]
        rng = keys[0] if seeds.ndim == 0 else jnp.stack(keys)
    if rng.ndim and rng.shape != (batch,):
        raise InputError(f"rng must be one seed or key, or one per row: got {rng.shape} for {batch} prompts")
    return row_keys(rng, batch)


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def read_warm(method: str, warm: Any, cold: Any) -> Any:
    """Returns what to start from; `cold` where nothing is given, and InputError where that is not this method's."""
    if warm is None:
        return cold
    try:
        shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), value) for value in (warm, cold)]
    except (TypeError, ValueError):  # no arrays at all
        shapes = [type(warm).__name__, jax.tree.map(jnp.shape, cold)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"warm must be the `warm` of an earlier output of method {method!r} with the same model and options: "
            f"wanted {shapes[1]}, got {shapes[0]}"
        )
    return warm


def whole_number(name: str, value: Any) -> int:
    """Returns an int; raises InputError for anything else than one whole number."""
    array = _numbers(value)
    if array is None or array.dtype.kind not in "iu" or array.ndim:
        raise InputError(f"{name} must be a whole number, got {value!r:.80}")
    return int(array)


def per_row(name: str, value: Any, batch: int, dtype: type) -> np.ndarray:
    """Returns one number per row, [B]; raises InputError when there are neither one nor B numbers."""
    array = _numbers(value)
    if array is None or (dtype is np.int32 and array.dtype.kind == "f"):
        raise InputError(f"{name} must be {'a whole number' if dtype is np.int32 else 'a number'}, got {value!r:.80}")
    if array.ndim > 1 or array.size not in (1, batch):
        raise InputError(f"{name} must be one number or one per row ({batch}), got {value!r:.80}")
    return np.broadcast_to(array, (batch,))


def _numbers(value: Any) -> np.ndarray | None:
    """Returns the value as an array of integers or floats, or None where it is none."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):  # lists of different lengths, jax keys among numbers
        return None
    return array if array.dtype.kind in "iuf" else None
