"""What training carries from step to step, and what it only reads.

Axis letters: A micro-batches of an update, B rows, T tokens of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from finetune.adapters import adapter as adapters
from finetune.adapters.adapter import Adapter


class Source(NamedTuple):
    """The texts that an encoder reads: tokens i32[A, B, S], 0 from `lengths` on, and lengths i32[A, B]."""

    tokens: jax.Array
    lengths: jax.Array


@struct.dataclass
class Batch:
    """The rows of one update, in A micro-batches whose gradients are added up.

    Attributes:
        tokens: i32[A, B, T].
        targets: bool[A, B, T]: whether a token is to be predicted from the ones before it in its text.
        segments: i32[A, B, T]: which text of the row a token belongs to, counted from 1; 0 is padding, at the end.
        positions: i32[A, B, T]: a token's place in its text.
        source: what an encoder reads of each row, which is then one text; None: nothing.
    """

    tokens: jax.Array
    targets: jax.Array
    segments: jax.Array
    positions: jax.Array
    source: Source | None = None


@struct.dataclass
class TrainState:
    """What an update replaces; its buffers are given up to the next state.

    Attributes:
        step: i32[], updates made.
        trainable: the trained values, float32: an adapter's, or a whole model's parameters.
        opt_state: the optimiser's.
        own: the objective's own (`finetune.objectives.BatchObjective`); {}: it has none.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    own: Any = struct.field(default_factory=dict)


class Constants(NamedTuple):
    """What every update reads: the model's frozen parameters, the adapter's frozen values, the objective's own."""

    base: Any
    frozen: Any
    objective: Any


class Method(NamedTuple):
    """What is trained: `attach(base, frozen, trainable)` gives the parameters that the model runs with.

    Attributes:
        attach: pure; called inside the loss.
        merge: the same as dense parameters.
        hook: (optimiser, steps of the run) -> optimiser.
        no_decay: names of trained values that weight decay leaves alone.
        finish: (frozen, trainable) -> the same, after training.
        moved: (trainable, steps of the run) -> how many numbers its updates move, all of them together.
    """

    attach: Callable[[Any, Any, Any], Any]
    merge: Callable[[Any, Any, Any], Any]
    hook: Callable[[optax.GradientTransformation, int], optax.GradientTransformation]
    no_decay: frozenset[str] = frozenset()
    finish: Callable[[Any, Any], tuple[Any, Any]] = lambda frozen, trainable: (frozen, trainable)
    moved: Callable[[Any, int], int] = lambda trainable, steps: adapters.count(trainable) * steps


def full_tuning(dtypes: Any) -> Method:
    """Trains every parameter, in float32; the model runs with them in `dtypes`, a tree of the parameters' own."""

    def attach(base, frozen, trainable):
        return jax.tree.map(lambda value, dtype: value.astype(dtype), trainable, dtypes)

    return Method(attach, attach, lambda inner, steps: inner)


def part_tuning(dtypes: Any) -> Method:
    """Trains some of the parameters, in float32; all others are the base, and stay as they are.

    Args:
        dtypes: of the trained ones, a tree: the model runs with them in these.
    """

    def attach(base, frozen, trainable):
        cast = jax.tree.map(lambda value, dtype: value.astype(dtype), trainable, dtypes)
        return unflatten_dict({**flatten_dict(base), **flatten_dict(cast)})

    return Method(attach, attach, lambda inner, steps: inner)


def adapter_tuning(adapter: Adapter) -> Method:
    """Trains an adapter's values alone."""

    def attach(base, frozen, trainable):
        return adapters.attach(adapter, base, frozen, trainable)

    def merge(base, frozen, trainable):
        return adapters.merge(adapter, base, frozen, trainable)

    return Method(attach, merge, adapter.hook, adapter.no_decay, adapter.finish, adapter.moved)


def with_whole(inner: Method, parts: tuple[str, ...]) -> Method:
    """Trains an adapter's values and, beside them, whole entries of the parameters: {"adapter": ..., "whole": ...}.

    Args:
        inner: of an adapter without a hook of the optimiser.
        parts: names at the top of the tree of parameters.
    """

    def given(base, trainable):
        new = {name: jax.tree.map(lambda x, like: x.astype(like.dtype), trainable["whole"][name], base[name])
               for name in parts}  # fmt: skip
        return {**base, **new}

    def attach(base, frozen, trainable):
        return inner.attach(given(base, trainable), frozen, trainable["adapter"])

    def merge(base, frozen, trainable):
        return inner.merge(given(base, trainable), frozen, trainable["adapter"])

    return Method(attach, merge, lambda optimizer, steps: optimizer, inner.no_decay)


def new_state(trainable: Any, optimizer: optax.GradientTransformation, own: Any = None) -> TrainState:
    """Returns the state before the first update; `own` is the objective's, None where it has none."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), {} if own is None else own)
