"""`make_decode_fn`: one jitted function around one `lax.while_loop`, for every method of the registry.

What is static (model, method, room for new tokens, stop tokens) is a hashable `Plan`; what users vary between calls
(prompts inside a bucket, seeds, sampling settings, tokens wanted per row) is an array and compiles nothing.

Axis letters: B batch, N room for new tokens, S cache slots.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from decoding.arguments import read_keys, read_limit, read_sampling, read_settings, read_warm, whole_number
from decoding.contexts import read_contexts, with_memory, writer, writer_params
from decoding.grammar.rows import read_grammars
from decoding.method import Call, Steps, WithDraft, target_params, with_kernels
from decoding.prefill import Prompts, encode_prompts, observed_prefill, pad_prompts
from decoding.registry import METHODS
from decoding.state import DecodeOutput, DecodeState, init_state
from models.cache import KVCache
from models.dolphin import Dolphin
from models.encoder_decoder import EncoderDecoder, Network, decoder_only
from models.errors import InputError, unknown_name
from models.sharding import mesh_of, place_rows, replicate


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static in a decode function: equal plans share their compiled code."""

    model: Network | Dolphin
    method: str
    options: Any
    room: int
    stop_tokens: tuple[int, ...]
    cache_slots: int | None

    @property
    def writer(self) -> Network:
        """The network that writes: the model but for what reads contexts."""
        return writer(self.model)

    def steps(self) -> Steps:
        """Returns the method's functions for this model."""
        return METHODS[self.method].make(self.writer, self.options, self.stop_tokens)

    def num_slots(self, bucket: int) -> int:
        """Returns S for prompts of a bucket: room for the padded prompt, and for every new token or as asked for.

        Where an encoder reads the prompts, the cache holds a start token in their place.
        """
        bucket = 1 if isinstance(self.model, EncoderDecoder) else bucket
        return bucket + self.room + self.steps().rows - 1 if self.cache_slots is None else max(self.cache_slots, bucket)


def start(plan: Plan, params: Any, prompts: Prompts, call: Call, cache: KVCache | None = None) -> DecodeState:
    """Returns the state before the first step. Pure.

    Args:
        plan: what is static.
        params: the model's parameters.
        prompts: the batch.
        call: what the user has set.
        cache: one of the plan's size that holds the prompts but for their last tokens (`decoding.prefill`). None: they
            are read here, as the method reads them; and so they are where it looks on (`Steps.looks_on`), and where the
            model has an encoder for them.
    """
    prompts = with_memory(plan.model, params, prompts)
    params = writer_params(plan.model, params)
    steps, target = plan.steps(), target_params(params)
    seen, observer = None, steps.looks_on
    if isinstance(plan.model, EncoderDecoder):
        cache, prompts = encode_prompts(plan.model, target, prompts, plan.num_slots(1))
    elif cache is None or observer is not None:
        slots = plan.num_slots(prompts.tokens.shape[1])
        cache, seen = observed_prefill(plan.writer, target, prompts, slots, steps.policy.read, observer)
        prompts = prompts.replace(seen=seen)
    last = jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0]
    carry = steps.init(params, prompts, cache, call)
    state = init_state(steps.policy.keep(cache), last, call.limit, plan.room, steps.most, carry)
    return state if steps.tailor is None else state.replace(kernels=steps.tailor.kernels(target, seen, call))


def advance(plan: Plan, params: Any, state: DecodeState, max_steps: jax.Array) -> DecodeState:
    """Takes steps until every row is done, `max_steps` (i32[]) at most. Pure; the one decoding loop."""
    step, kernels = plan.steps().step, state.kernels
    params = with_kernels(writer_params(plan.model, params), kernels)

    def unfinished(carry):
        taken, state = carry
        return (taken < max_steps) & ~state.done.all()

    def body(carry):
        taken, state = carry
        return taken + 1, step(params, state)

    first = jnp.zeros((), jnp.int32), state.replace(kernels=None)  # which no step changes
    return jax.lax.while_loop(unfinished, body, first)[1].replace(kernels=kernels)


def decode(plan: Plan, params: Any, prompts: Prompts, call: Call) -> DecodeOutput:
    """Decodes a batch from prompts to new tokens. Pure, to be jitted or traced into something larger."""
    state = start(plan, params, prompts, call)
    state = advance(plan, params, state, jnp.asarray(plan.room, jnp.int32))
    return output(plan, state)


def output(plan: Plan, state: DecodeState) -> DecodeOutput:
    """Returns what a state says so far."""
    steps = plan.steps()
    return DecodeOutput(state.tokens, state.lengths, state.stats, steps.warm(state.carry), steps.found(state))


def _spread(prompts: Prompts, call: Call, mesh: Mesh | None) -> tuple[Prompts, Call]:
    """Returns a batch with its rows spread over the mesh that the parameters lie on."""
    if mesh is None:
        return prompts, call
    prompts, rows = place_rows((prompts, call.replace(warm=None, grammar=None)), mesh)
    return prompts, rows.replace(warm=call.warm, grammar=call.grammar)  # which are no row's own


_decode = jax.jit(decode, static_argnums=0)
_start = jax.jit(start, static_argnums=0)
_advance = jax.jit(advance, static_argnums=0, donate_argnums=2)


class DecodeFn:
    """A decode function for one model and method; see `make_decode_fn`.

    Calling it decodes a batch in one jitted call. `start` and `advance` are its two halves for callers that want to see
    tokens as they are made or to time prompt and decoding apart: the same step, jitted on its own, with the state
    donated.
    """

    def __init__(self, plan: Plan, settings: Mapping[str, Any] | None = None):
        """Wraps a plan and what calls set the method's own settings to where they do not; see `make_decode_fn`."""
        self.plan, self.settings = plan, dict(settings or {})
        self._advances: dict[Any, Callable] = {}  # compiled, by the shapes of params and state

    @property
    def label(self) -> str:
        """What its texts keep to: `exact`, `distribution` or `lossy` (`Method.label`)."""
        return METHODS[self.plan.method].label_of(self.plan.options)

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        rng: int | Sequence[int] | jax.Array = 0,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        warm: Any = None,
        draft_prompts: Sequence[Sequence[int]] | None = None,
        contexts: Any = None,
        grammars: Any = None,
        **sampling: float | Sequence[float],
    ) -> DecodeOutput:
        """Decodes.

        Args:
            params: the model's parameters; for a method that drafts with a second model or a head
                `WithDraft(target, draft)`.
                Where they lie on a mesh (`models.sharding`), rows are spread over it too, and every process that holds
                a part of it makes the same call.
            prompts: B lists of token ids, each of any length.
            rng: a seed or key for the batch (row b then uses that key folded with b), or B seeds or keys, one per row.
                A row's text depends on its own seed and prompt alone, but where a method says that rows share
                something (`Method.shared`).
            max_new_tokens: new tokens wanted, for all rows or one number per row; None or at most what the function was
                made with.
            warm: an earlier output's `warm`, to start from what a drafter has learned; None starts afresh.
            draft_prompts: B lists of token ids that a draft model reads in place of the prompts (a shortened context);
                None: the prompts. The text itself depends on them only where a method is lossy.
            contexts: for a `models.dolphin.Dolphin` B lists of ids of its compressor's tokenizer, read into memory that
                stands where a prompt has the id `decoding.contexts.SLOT`, or in front of it; for any decoder-only model
                such embeddings themselves, f[B, N, D] (`decoding.contexts.memory_of`).
            grammars: a `decoding.grammar.Grammar` for all rows, or one or None per row; for methods that take them.
            **sampling: temperature, top_k, top_p, min_p, repetition_penalty (`decoding.sampling.Sampling`), a number
                for all rows or one per row, for methods that sample; and the method's own settings, likewise.

        Returns:
            `DecodeOutput` with i32[B, N] tokens, i32[B] lengths and counts.

        Raises:
            InputError: an empty prompt, one that does not fit the cache, ids of another tokenizer, or a setting out of
                range.
        """
        self._check_params(params)
        prompts, call = self.inputs(
            prompts,
            rng,
            max_new_tokens=max_new_tokens,
            warm=warm,
            draft_prompts=draft_prompts,
            contexts=contexts,
            grammars=grammars,
            **sampling,
        )
        mesh = mesh_of(params)
        output = _decode(self.plan, params, *_spread(prompts, call, mesh))
        return output if mesh is None else replicate(output, mesh)

    def start(self, params: Any, prompts: Prompts, call: Call) -> DecodeState:
        """Reads the prompts (as `inputs` returns them) and returns the state before the first step."""
        self._check_params(params)
        return _start(self.plan, params, *_spread(prompts, call, mesh_of(params)))

    def advance(self, params: Any, state: DecodeState, max_steps: int | None = None) -> DecodeState:
        """Takes up to `max_steps` steps (None: until all rows are done). The state is donated: do not use it again."""
        steps = self.plan.room if max_steps is None else max_steps
        return _advance(self.plan, params, state, jnp.asarray(steps, jnp.int32))

    def output(self, state: DecodeState) -> DecodeOutput:
        """Returns a state's tokens and counts, as a call returns them."""
        return output(self.plan, state)

    def compile(self, params: Any, prompts: Prompts, call: Call, *cache: KVCache) -> tuple[Callable, Callable]:
        """Returns (start, advance) compiled for arrays of these shapes, with the signatures of the two methods above.

        For callers who want compilation to be a step of its own. With `cache_slots`, prompts of all buckets share one
        compiled `advance`. Where a cache is given, `start` takes one too (see the function of that name).
        """
        steps = jnp.asarray(self.plan.room, jnp.int32)
        start_compiled = _start.lower(self.plan, params, prompts, call, *cache).compile()
        state = jax.eval_shape(functools.partial(start, self.plan), params, prompts, call)
        leaves, structure = jax.tree.flatten((params, state))
        key = structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._advances:
            self._advances[key] = _advance.lower(self.plan, params, state, steps).compile()
        advance_compiled = self._advances[key]

        def run(params: Any, state: DecodeState, max_steps: int | None = None) -> DecodeState:
            return advance_compiled(params, state, steps if max_steps is None else jnp.asarray(max_steps, jnp.int32))

        return start_compiled, run

    def inputs(
        self,
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
        """Checks a call's arguments (see `__call__`) and returns them as the arrays that `decode` and `start` take."""
        drafts_alone = METHODS[self.plan.method].drafts and draft_prompts is None
        padded = read_contexts(self.plan.model, prompts, contexts, drafts_alone)
        batch, held = len(padded.lengths), self._held(padded.lengths)
        capacity = self._capacity(int(held.max()), padded.tokens.shape[1], draft_prompts is None)
        limit = read_limit(self.plan.room if max_new_tokens is None else max_new_tokens, batch, self.plan.room)
        # The newest token never enters the cache, so one more token fits than there are slots left.
        free = capacity - held + 1
        method = self.plan.method
        own = {name: sampling.pop(name) for name in METHODS[method].settings if name in sampling}
        own = read_settings(METHODS[method].settings, {**self.settings, **own}, batch)
        settings = read_sampling(sampling, batch, method, METHODS[method].temperature)
        read = self._draft_prompts(draft_prompts, batch)
        rows = np.minimum(limit, free), read_keys(rng, batch), settings
        grammar = self._grammars(grammars, batch)
        warm = read_warm(method, warm, self.plan.steps().cold())
        return padded, Call(*rows, warm=warm, draft_prompts=read, own=own, grammar=grammar)

    def _held(self, lengths: np.ndarray) -> np.ndarray:
        """Returns how many tokens of each prompt the decoder holds: of those that an encoder reads, a start token.

        Raises InputError where one is longer than the encoder's longest text.
        """
        if not isinstance(self.plan.model, EncoderDecoder):
            return lengths
        most = self.plan.model.config.encoder.max_length
        if lengths.max() > most:
            raise InputError(
                f"the longest prompt has {lengths.max()} tokens, the encoder reads {most} at most: shorten it, or use "
                "a model that reads more"
            )
        return np.ones_like(lengths)

    def _check_params(self, params: Any) -> None:
        method = METHODS[self.plan.method]
        if method.paired != isinstance(params, WithDraft):
            wanted = "WithDraft(target, draft)" if method.drafts else "the model's own parameters, not WithDraft"
            wanted = "WithDraft(target, head), with a trained head (--head FILE)" if method.own_head else wanted
            raise InputError(f"method {self.plan.method!r} takes {wanted} as params")

    def _draft_prompts(self, prompts: Sequence[Sequence[int]] | None, batch: int) -> Prompts | None:
        """Returns what the draft model is to read; raises InputError where there is none, or where it does not fit."""
        if prompts is None:
            return None
        if not METHODS[self.plan.method].drafts:
            raise InputError(f"method {self.plan.method!r} has no draft model: leave out draft_prompts")
        draft = self.plan.options.draft.config
        padded = pad_prompts(prompts, draft.vocab_size)
        if len(padded.lengths) != batch:
            raise InputError(f"draft_prompts must be {batch}, one for each prompt; got {len(padded.lengths)}")
        longest = int(padded.lengths.max()) + self.plan.room + self.plan.steps().rows
        if longest > draft.max_length:
            raise InputError(
                f"draft_prompts and the new tokens come to {longest} tokens, the draft model's context is "
                f"{draft.max_length}: shorten them"
            )
        return padded

    def _grammars(self, grammars: Any, batch: int) -> Any:
        """Returns where the rows stand in their grammars; raises InputError where the method takes none."""
        if grammars is not None and not METHODS[self.plan.method].grammars:
            taking = ", ".join(name for name, method in METHODS.items() if method.grammars)
            raise InputError(f"method {self.plan.method!r} takes no grammars: use {taking}")
        return read_grammars(grammars, batch, self.plan.writer.config.vocab_size, self.plan.stop_tokens)

    def _capacity(self, longest: int, bucket: int, own: bool) -> int:
        """Returns how many tokens a row may hold; raises InputError when the longest prompt is longer.

        `own` says that a draft model reads the prompts themselves.
        """
        slots, context, whose = self.plan.cache_slots, self.plan.writer.config.max_length, "model"
        if METHODS[self.plan.method].drafts and own and self.plan.options.draft.config.max_length < context:
            context, whose = self.plan.options.draft.config.max_length, "draft model"
        spare = self.plan.steps().rows - 1  # a step writes its other rows behind the last token that may enter
        if slots is not None and longest > slots - spare:
            needed = f", of which a step of method {self.plan.method!r} needs {spare} to spare" if spare else ""
            raise InputError(
                f"the longest prompt has {longest} tokens, the cache {slots} slots{needed}: raise cache_slots to "
                f"{longest + spare} or more"
            )
        if longest > context:
            raise InputError(
                f"the longest prompt has {longest} tokens, the {whose}'s context only {context}: shorten it, or use a "
                "model with a longer context"
            )
        return min(context, (self.plan.num_slots(bucket) if slots is None else slots) - spare)


def make_decode_fn(
    model: Network | Dolphin,
    method: str = "greedy",
    *,
    max_new_tokens: int = 128,
    stop_tokens: Sequence[int] = (),
    cache_slots: int | None = None,
    **options: Any,
) -> DecodeFn:
    """Returns `decode_fn(params, prompts, rng=0, *, max_new_tokens=None, **sampling) -> DecodeOutput`.

    Args:
        model: the network, or one with a compressor beside it (`models.dolphin`).
        method: a name in `METHODS`.
        max_new_tokens: room for new tokens per row; calls may ask for fewer.
        stop_tokens: ids that end a row (`tokenizer.stop_ids`).
        cache_slots: tokens that the cache holds per row, prompt included; a row ends when it is full, as it does at the
            end of the model's context. None: as many as the prompt's bucket and `max_new_tokens` need.
        **options: the method's own static options, and its own settings for calls that do not give them.

    Raises:
        InputError: an unknown method or option, or a size below one.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    cache_slots = None if cache_slots is None else whole_number("cache_slots", cache_slots)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1 here, got {max_new_tokens} (a call may ask for 0)")
    if cache_slots is not None and cache_slots < 1:
        raise InputError(f"cache_slots must be at least 1, got {cache_slots}")
    if not isinstance(stop_tokens, Sequence):
        raise InputError(f"stop_tokens must be a list of token ids, got {stop_tokens!r}")
    stops = tuple(sorted({whole_number("an id in stop_tokens", token) for token in stop_tokens}))
    if not METHODS[method].encoders:
        decoder_only(writer(model), f"method {method!r}")
    settings = {name: options.pop(name) for name in METHODS[method].settings if name in options}
    read_settings(METHODS[method].settings, settings, 1)
    plan = Plan(model, method, _read_options(method, options), max_new_tokens, stops, cache_slots)
    plan.steps()  # refuses options that do not fit the model
    return DecodeFn(plan, settings)


def _read_options(method: str, options: dict[str, Any]) -> Any:
    """Returns the method's own options; raises InputError where one is unknown or cannot be."""
    known = [field.name for field in dataclasses.fields(METHODS[method].options)]
    for name in options:
        if name not in known:
            raise unknown_name(f"option of method {method!r}", name, [*known, *METHODS[method].settings])
    if "draft" in options:
        decoder_only(options["draft"], "drafting")
    try:
        return METHODS[method].options(**options)
    except TypeError as error:
        raise InputError(f"an option of method {method!r} has the wrong type: {error}; got {options!r:.200}") from error
