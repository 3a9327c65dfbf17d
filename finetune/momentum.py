"""What contrastive training carries from update to update: a slow copy of an encoder, and queues of its vectors
(MoCo, 1911.05722, section 3; ALBEF, 2107.07651, section 3.2). Pure functions on values; nothing here has a gradient.

Axis letters: B rows, K entries of a queue, E width of a vector.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.errors import InputError


@struct.dataclass
class Queue:
    """The vectors of the last K pairs; the oldest give way first.

    Attributes:
        texts: f32[K, E].
        codes: f32[K, E].
        keys: i32[K, 2], what tells texts, and codes, that are equal.
        filled: bool[K], whether there is a pair.
        added: i32[], rows added so far; the next stands at added % K.
    """

    texts: jax.Array
    codes: jax.Array
    keys: jax.Array
    filled: jax.Array
    added: jax.Array


@struct.dataclass
class Vectors:
    """What a batch adds to a queue: texts and codes f32[B, E], keys i32[B, 2], valid bool[B], whether a row counts."""

    texts: jax.Array
    codes: jax.Array
    keys: jax.Array
    valid: jax.Array


def empty_queue(size: int, width: int) -> Queue:
    """Returns a queue of `size` entries without a pair in it."""
    vectors = jnp.zeros((size, width), jnp.float32)
    return Queue(
        vectors,
        jnp.copy(vectors),  # a buffer of its own: an update gives both up
        jnp.zeros((size, 2), jnp.int32),
        jnp.zeros((size,), bool),
        jnp.zeros((), jnp.int32),
    )


def enqueue(queue: Queue, new: Vectors) -> Queue:
    """Returns the queue with the rows of a batch in place of its oldest ones.

    Raises:
        InputError: a queue whose size is not a multiple of the batch, so that a batch would not fit in one place.
    """
    check_queue(len(queue.filled), len(new.valid))
    start = queue.added % len(queue.filled)

    def put(old: jax.Array, rows: jax.Array) -> jax.Array:
        rows = jax.lax.stop_gradient(rows).astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, rows, start, axis=0)

    return Queue(
        put(queue.texts, new.texts),
        put(queue.codes, new.codes),
        put(queue.keys, new.keys),
        put(queue.filled, new.valid),
        queue.added + len(new.valid),
    )


def check_queue(size: int, rows: int) -> None:
    """Raises InputError where a queue does not take whole batches."""
    if size < rows or size % rows:
        raise InputError(
            f"a queue of {size} is not a multiple of the batch of {rows} rows: take {rows * max(1, round(size / rows))}"
        )


def follow(slow: Any, fast: Any, momentum: float) -> Any:
    """Returns momentum * slow + (1 - momentum) * fast, leaf by leaf; at 1 slow stays as it is, at 0 it is fast."""
    return jax.tree.map(lambda old, new: momentum * old + (1.0 - momentum) * new.astype(old.dtype), slow, fast)
