"""Speculative sampling: a small model drafts a chain, the target verifies it in one pass.

Sources: Leviathan et al. (2211.17192, algorithm 1) and Chen et al. (2302.01318, algorithm 2). The default length is 4.

Axis letters: B batch, D drafted tokens, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from decoding.method import Call, Method, Steps
from decoding.prefill import Prompts
from decoding.speculative.draft_model import (
    DraftOptions,
    DraftStream,
    check_draft,
    draw_next,
    keep,
    read_newest,
    start_stream,
)
from decoding.speculative.drafter import Drafter, Round, Seen
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import chain
from decoding.speculative.verify import Mode
from models.cache import commit
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class SpeculativeSamplingOptions(DraftOptions):
    """Tokens drafted per step."""

    length: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise InputError(f"length must be at least 1, got {self.length}")


def chain_drafter(draft: Decoder, length: int, temperature: float | None, mode: Mode) -> Drafter:
    """Drafts a chain, each token drawn from the draft's law behind the ones before it.

    Args:
        draft: the draft model.
        length: D, tokens drafted per step.
        temperature: the draft's own, or None for the row's (greedy rows are then drafted by rank).
        mode: how the chain is verified; `TokenTree.laws` holds f32[B, D, V], the laws that it was drawn from.
    """
    template = chain(length)

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> DraftStream:
        return start_stream(draft, params.draft, prompts, slots)

    def propose(params: Any, stream: DraftStream, round_: Round):
        def extend(carry, step):
            cache, token = carry
            output = draft.apply({"params": params.draft}, token[:, None], cache=cache)
            chosen, law = draw_next(output.logits[:, 0], round_, step, temperature)
            return (commit(output.cache, None, jnp.ones_like(token)), chosen), (chosen, law)

        logits, stream = read_newest(draft, params.draft, stream, round_)
        token, law = draw_next(logits, round_, jnp.zeros((), jnp.int32), temperature)
        root = stream.cache.length
        (cache, _), (tokens, laws) = jax.lax.scan(extend, (stream.cache, token), jnp.arange(1, length))
        tokens = jnp.concatenate([round_.last[:, None], token[:, None], tokens.T], axis=1)
        laws = jnp.concatenate([law[:, None], jnp.swapaxes(laws, 0, 1)], axis=1)
        drafted = jnp.full_like(root, length)
        return template.tree(tokens, laws), stream.replace(cache=cache.replace(length=root)), drafted, drafted

    def observe(params: Any, stream: DraftStream, seen: Seen) -> DraftStream:
        return keep(stream, seen.verified, seen.verified.tokens, template.parents)

    return Drafter(template.width, length + 1, mode, init, propose, observe)


def make_speculative_sampling(
    model: Decoder, options: SpeculativeSamplingOptions, stop_tokens: tuple[int, ...]
) -> Steps:
    """Drafts a chain of `options.length` tokens with `options.draft`."""
    draft = check_draft(model, options.draft, "speculative_sampling")
    drafter = chain_drafter(draft, options.length, options.draft_temperature, "rrs_wor")
    return make_speculative(model, drafter, stop_tokens)


SPECULATIVE_SAMPLING = Method(
    "exact", SpeculativeSamplingOptions, make_speculative_sampling, temperature=0.0, drafts=True
)
