"""`make_decode_fn`: a method of the registry as one jitted function of a model's parameters and a batch of prompts.

Axis letters: B batch, N room for new tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from decoding.arguments import read_settings, whole_number
from decoding.calls import read_call
from decoding.contexts import writer
from decoding.method import Call, WithDraft
from decoding.plan import Plan, advance, decode, output, start
from decoding.prefill import Prompts
from decoding.registry import METHODS
from decoding.state import DecodeOutput, DecodeState
from models.cache import KVCache
from models.dolphin import Dolphin
from models.encoder_decoder import Network, decoder_only
from models.errors import InputError, unknown_name
from models.sharding import mesh_of, place_rows, replicate


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
        self, prompts: Sequence[Sequence[int]], rng: int | Sequence[int] | jax.Array = 0, **call: Any
    ) -> tuple[Prompts, Call]:
        """Checks a call's arguments (see `__call__`) and returns them as the arrays that `start` takes."""
        return read_call(self.plan, self.settings, prompts, rng, **call)

    def _check_params(self, params: Any) -> None:
        method = METHODS[self.plan.method]
        if method.paired != isinstance(params, WithDraft):
            wanted = "WithDraft(target, draft)" if method.drafts else "the model's own parameters, not WithDraft"
            wanted = "WithDraft(target, head), with a trained head (--head FILE)" if method.own_head else wanted
            raise InputError(f"method {self.plan.method!r} takes {wanted} as params")


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
    vocab = writer(model).config.vocab_size
    if stops and not 0 <= stops[0] <= stops[-1] < vocab:
        raise InputError(f"stop_tokens {list(stops)} must be ids of the model, 0 to {vocab - 1}: another tokenizer's?")
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
    for field in dataclasses.fields(METHODS[method].options):
        if field.type is int and field.name in options:
            options[field.name] = whole_number(field.name, options[field.name])
    if "draft" in options:
        decoder_only(options["draft"], "drafting")
    try:
        return METHODS[method].options(**options)
    except TypeError as error:
        raise InputError(f"an option of method {method!r} has the wrong type: {error}; got {options!r:.200}") from error
