"""Reading and changing what a model computes inside: attention outputs of all layers, as attend policies.

Both work on the newest token of each row, behind a cache of the tokens before it: what is patched there changes nothing
before it, so that a prompt is read once for any number of runs. What is patched is what heads put out, before their
output projection; as that is linear, it is the same as patching what a block's attention adds to the residual stream.

Axis letters: B batch, L layers, H heads, Dh head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from models.attention import dense_attend


@struct.dataclass
class Patch:
    """The context of `patched_attend`.

    Attributes:
        outputs: a [B, 1, H, Dh] array for each layer, what `recorded_attend` has noted in another run.
        chosen: bool[L], the layers whose outputs are replaced.
    """

    outputs: tuple[jax.Array, ...]
    chosen: jax.Array


def recorded_attend(q, k, v, cache, ctx, *, config, layer, bias=None):
    """Attends as `dense_attend` does; `ctx`, () at first, ends as a tuple of every layer's output [B, T, H, Dh]."""
    out, cache, _ = dense_attend(q, k, v, cache, None, config=config, layer=layer, bias=bias)
    return out, cache, (*ctx, out)


def patched_attend(q, k, v, cache, ctx: Patch, *, config, layer, bias=None) -> tuple[jax.Array, Any, Patch]:
    """Attends as `dense_attend` does, with the outputs of chosen layers taken from elsewhere."""
    out, cache, _ = dense_attend(q, k, v, cache, None, config=config, layer=layer, bias=bias)
    return jnp.where(ctx.chosen[layer], ctx.outputs[layer], out), cache, ctx
