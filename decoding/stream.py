"""Text as it is made, for notebooks and terminals: the same jitted step as `make_decode_fn`, a few steps at a time."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from decoding.arguments import whole_number
from decoding.decode import DecodeFn
from decoding.state import DecodeState
from models.errors import InputError
from models.weights.tokenizer import Tokenizer


def stream(
    decode_fn: DecodeFn,
    params: Any,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    rng: int = 0,
    *,
    steps: int = 1,
    **call: Any,
) -> Generator[str, None, DecodeState]:
    """Yields the text of one prompt piece by piece; the pieces joined are the text that one call of `decode_fn` gives.

    Args:
        decode_fn: what `make_decode_fn` returned.
        params: the model's parameters.
        tokenizer: turns tokens to text. A piece ends where characters are complete (a character may take several
            tokens).
        prompt: token ids.
        rng: the seed, as for `decode_fn`.
        steps: decoding steps between two looks at the tokens.
        **call: max_new_tokens and sampling settings, as for `decode_fn`.
    """
    state = decode_fn.start(params, *decode_fn.inputs([prompt], rng, **call))
    return (yield from stream_state(decode_fn.advance, params, state, tokenizer, steps))


def stream_state(
    advance: Callable[[Any, DecodeState, int], DecodeState],
    params: Any,
    state: DecodeState,
    tokenizer: Tokenizer,
    steps: int = 1,
) -> Generator[str, None, DecodeState]:
    """Yields the text of a one-row state as `advance` (of a `DecodeFn`, or compiled) goes on; returns the last one."""
    if whole_number("steps", steps) < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    written = ""
    while True:
        finished = bool(state.done[0])
        tokens = np.asarray(state.tokens)[0, : int(state.lengths[0])]  # a slice on the device compiles for every length
        text = tokenizer.decode(tokens.tolist())
        if len(text) > len(written) and (finished or not text.endswith("\ufffd")):
            yield text[len(written) :]
            written = text
        if finished:
            return state
        state = advance(params, state, steps)
