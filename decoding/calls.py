"""What a call of a decode function is given, checked and made into arrays.

Axis letters: B batch, S cache slots.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from decoding.arguments import read_keys, read_limit, read_sampling, read_settings, read_warm
from decoding.contexts import read_contexts
from decoding.grammar.rows import read_grammars
from decoding.method import Call
from decoding.plan import Plan
from decoding.prefill import Prompts, pad_prompts
from decoding.registry import METHODS
from models.encoder_decoder import EncoderDecoder
from models.errors import InputError


def read_call(
    plan: Plan,
    settings: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    rng: int | Sequence[int] | jax.Array = 0,
    *,
    max_new_tokens: int | Sequence[int] | None = None,
    warm: Any = None,
    draft_prompts: Sequence[Sequence[int]] | None = None,
    contexts: Any = None,
    grammars: Any = None,
    **sampling: float | Sequence[float],
) -> tuple[Prompts, Call]:
    """Checks a call's arguments (`decoding.decode.DecodeFn.__call__`) and returns them as `start` takes them.

    Args:
        plan: the function's plan.
        settings: the method's own settings where the call does not give them.
        prompts, rng, max_new_tokens, warm, draft_prompts, contexts, grammars, **sampling: the call's arguments.
    """
    drafts_alone = METHODS[plan.method].drafts and draft_prompts is None
    padded = read_contexts(plan.model, prompts, contexts, drafts_alone)
    batch, held = len(padded.lengths), _held(plan, padded.lengths)
    capacity = _capacity(plan, int(held.max()), padded.tokens.shape[1], draft_prompts is None)
    limit = read_limit(plan.room if max_new_tokens is None else max_new_tokens, batch, plan.room)
    # The newest token never enters the cache, so one more token fits than there are slots left.
    free = capacity - held + 1
    method = plan.method
    own = {name: sampling.pop(name) for name in METHODS[method].settings if name in sampling}
    own = read_settings(METHODS[method].settings, {**settings, **own}, batch)
    law = read_sampling(sampling, batch, method, METHODS[method].temperature)
    read = _draft_prompts(plan, draft_prompts, batch, padded.tokens.shape[1])
    rows = np.minimum(limit, free), read_keys(rng, batch), law
    grammar = _grammars(plan, grammars, batch)
    warm = read_warm(method, warm, plan.steps().cold())
    return padded, Call(*rows, warm=warm, draft_prompts=read, own=own, grammar=grammar)


def _held(plan: Plan, lengths: np.ndarray) -> np.ndarray:
    """Returns how many tokens of each prompt the decoder holds: of those that an encoder reads, a start token.

    Raises InputError where one is longer than the encoder's longest text.
    """
    if not isinstance(plan.model, EncoderDecoder):
        return lengths
    most = plan.model.config.encoder.max_length
    if lengths.max() > most:
        raise InputError(
            f"the longest prompt has {lengths.max()} tokens, the encoder reads {most} at most: shorten it, or use "
            "a model that reads more"
        )
    return np.ones_like(lengths)


def _draft_prompts(plan: Plan, prompts: Sequence[Sequence[int]] | None, batch: int, bucket: int) -> Prompts | None:
    """Returns what the draft model is to read; raises InputError where there is none, or where it does not fit."""
    if prompts is None:
        return None
    if not METHODS[plan.method].drafts:
        raise InputError(f"method {plan.method!r} has no draft model: leave out draft_prompts")
    draft = plan.options.draft.config
    padded = pad_prompts(prompts, draft.vocab_size)
    if len(padded.lengths) != batch:
        raise InputError(f"draft_prompts must be {batch}, one for each prompt; got {len(padded.lengths)}")
    needed = bucket + plan.room + plan.steps().rows - 1
    if plan.num_slots(bucket) < needed:  # what the draft's cache has room for is behind the prompts' bucket
        raise InputError(f"draft_prompts need cache_slots {needed} beside these prompts, got {plan.cache_slots}")
    longest = int(padded.lengths.max()) + plan.room + plan.steps().rows
    if longest > draft.max_length:
        raise InputError(
            f"draft_prompts and the new tokens come to {longest} tokens, the draft model's context is "
            f"{draft.max_length}: shorten them"
        )
    return padded


def _grammars(plan: Plan, grammars: Any, batch: int) -> Any:
    """Returns where the rows stand in their grammars; raises InputError where the method takes none."""
    if grammars is not None and not METHODS[plan.method].grammars:
        taking = ", ".join(name for name, method in METHODS.items() if method.grammars)
        raise InputError(f"method {plan.method!r} takes no grammars: use {taking}")
    return read_grammars(grammars, batch, plan.writer.config.vocab_size, plan.stop_tokens)


def _capacity(plan: Plan, longest: int, bucket: int, own: bool) -> int:
    """Returns how many tokens a row may hold; raises InputError when the longest prompt is longer.

    `own` says that a draft model reads the prompts themselves.
    """
    slots, context, whose = plan.cache_slots, plan.writer.config.max_length, "model"
    if METHODS[plan.method].drafts and own and plan.options.draft.config.max_length < context:
        context, whose = plan.options.draft.config.max_length, "draft model"
    spare = plan.steps().rows - 1  # a step writes its other rows behind the last token that may enter
    if slots is not None and longest > slots - spare:
        needed = f", of which a step of method {plan.method!r} needs {spare} to spare" if spare else ""
        raise InputError(
            f"the longest prompt has {longest} tokens, the cache {slots} slots{needed}: raise cache_slots to "
            f"{longest + spare} or more"
        )
    if longest > context:
        raise InputError(
            f"the longest prompt has {longest} tokens, the {whose}'s context only {context}: shorten it, or use a "
            "model with a longer context"
        )
    return min(context, (plan.num_slots(bucket) if slots is None else slots) - spare)
