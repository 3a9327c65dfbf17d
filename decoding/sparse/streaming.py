"""Streaming attention: the first `sink` tokens and the last `local` ones, in every layer and head. Lossy.

Source: StreamingLLM (2309.17453), as the control for policies that choose what to read: what stands between sink and
window is lost. As in LServe's streaming heads (2502.14866), and unlike in StreamingLLM, keys keep the rotary positions
that they were written with. Nothing is evicted, and the prompt is read with dense attention, so that what is compared
is decoding alone. A layer with a sliding window of its own keeps that.
"""

import dataclasses

from decoding.method import Method, Policy, Steps
from decoding.sparse.selected import merged, own_window, window_attention
from decoding.sparse.steps import SparseOptions, policy_steps
from models.attention import Attend, append_rows
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class StreamingOptions(SparseOptions):
    """Tokens that are always seen: the first `sink`, and the last `local`, the newest included."""

    sink: int = 128
    local: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.sink, self.local)


def check_window(sink: int, local: int, name: str = "local") -> None:
    """Raises InputError unless a query sees at least itself; `name` is what the user calls the window."""
    if sink < 0 or local < 1:
        raise InputError(f"sink must be 0 or more and {name} 1 or more (tokens), got {sink} and {local}")


def streaming_attend(sink: int, local: int) -> Attend:
    """Returns the policy; its context is `TreeRows`."""

    def attend(q, k, v, cache, ctx, *, config, layer):
        if config.window is not None:
            return own_window(q, k, v, cache, ctx, config=config, layer=layer)
        cache = append_rows(cache, k, v, ctx)
        kv_heads = range(config.num_kv_heads)
        out = window_attention(q, cache, ctx, config, sink=sink, local=local, kv_heads=kv_heads)
        return merged(out, q), cache, ctx

    return attend


def make_streaming(model: Decoder, options: StreamingOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Samples (greedily by default) with streaming attention."""
    return policy_steps(model, Policy(streaming_attend(options.sink, options.local)), options, stop_tokens)


STREAMING = Method("lossy", StreamingOptions, make_streaming, temperature=0.0)
