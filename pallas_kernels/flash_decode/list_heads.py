"""Which heads of a cache lists of slots or pages read.

Axis letters: B batch, K heads of the cache, N lists.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class ListHeads(NamedTuple):
    """In every batch row, `each` lists read the first of `heads`, as many the next one, and so on.

    Attributes:
        each: lists of a head.
        heads: the heads that are read, below `num_heads`.
        num_heads: K.
    """

    each: int
    heads: tuple[int, ...]
    num_heads: int

    def table(self, batch: int) -> np.ndarray:
        """Returns i32[N], N = batch * len(heads) * each: the head of [B * K] that each list reads."""
        rows = np.arange(batch, dtype=np.int32)[:, None] * self.num_heads + np.asarray(self.heads, np.int32)[None, :]
        return np.repeat(rows.reshape(-1), self.each)

    def entry(self, n: jax.Array) -> jax.Array:
        """Returns entry i32[] n of `table`, in operations that the index maps of kernels may have."""
        place = lax.div(n, self.each)
        if self.heads == tuple(range(self.num_heads)):
            return place
        row, index = lax.div(place, len(self.heads)), lax.rem(place, len(self.heads))
        head = sum((index == i).astype(jnp.int32) * head for i, head in enumerate(self.heads))
        return row * self.num_heads + head
