"""What a decoding method is to the loop: how to start, and one step."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import struct

from decoding.prefill import Prompts
from decoding.sampling import Sampling
from decoding.state import DecodeState
from models.cache import KVCache
from models.decoder import Decoder


@struct.dataclass
class Call:
    """What a user may change from call to call, as arrays.

    Attributes:
        limit: i32[B], new tokens per row at most.
        keys: one random key per row.
        sampling: the rows' sampling settings.
    """

    limit: jax.Array
    keys: jax.Array
    sampling: Sampling


class Steps(NamedTuple):
    """A method made for one model: two pure functions that are traced inside the jitted loop.

    Attributes:
        init: (params, prompts, cache, call) -> what the method keeps in `DecodeState.carry`.
        step: (params, state) -> state, with at least one token emitted by every row that is not done.
    """

    init: Callable[[Any, Prompts, KVCache, Call], Any]
    step: Callable[[Any, DecodeState], DecodeState]


class Method(NamedTuple):
    """A row of the registry.

    Attributes:
        label: `exact` (the tokens of plain greedy decoding), `distribution` (the law of plain sampling), or `lossy`.
        options: frozen dataclass of the method's static options.
        make: (model, options, stop_tokens) -> Steps.
        samples: whether calls may pass sampling settings.
    """

    label: Literal["exact", "distribution", "lossy"]
    options: type
    make: Callable[[Decoder, Any, tuple[int, ...]], Steps]
    samples: bool
