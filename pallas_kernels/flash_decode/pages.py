"""Lists of pages, put in the order in which kernels read them.

Page i of a cache is its slots i * page_size to (i + 1) * page_size - 1; the last page may be cut short.

Axis letters: N lists, P pages of a list, R rows of queries.
"""

import jax
import jax.numpy as jnp

PAGE_SIZES = (16, 32, 64, 128)  # of kernels: whole tiles of a TPU, powers of two for a GPU


def wanted_pages(pages: jax.Array, lengths: jax.Array, first: jax.Array, page_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the pages that some row sees, in rising order and before all others, and how many they are.

    Args:
        pages: i32[N, P], none twice; a negative one stands for none.
        lengths: i32[N], live slots.
        first: i32[N, R], the first slot that each row sees.
        page_size: slots of a page.

    Returns:
        (i32[N, P], 0 from the count on; i32[N] counts).
    """
    begin = pages * page_size
    wanted = (pages >= 0) & (begin < lengths[:, None]) & (begin + page_size > jnp.min(first, axis=1)[:, None])
    beyond = jnp.iinfo(jnp.int32).max
    ordered = jnp.sort(jnp.where(wanted, pages, beyond), axis=1)
    return jnp.where(ordered == beyond, 0, ordered), jnp.sum(wanted, axis=1, dtype=jnp.int32)


def slots_of_pages(pages: jax.Array, lengths: jax.Array, page_size: int) -> jax.Array:
    """Returns the live slots of pages i32[N, P] in their order, i32[N, P * page_size], -1 in the place of others.

    Args:
        pages: negative ones stand for none.
        lengths: i32[N], live slots.
        page_size: slots of a page.
    """
    slots = pages[:, :, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)[None, None, :]
    live = (slots >= 0) & (slots < lengths[:, None, None])
    return jnp.where(live, slots, -1).reshape(len(pages), -1)
