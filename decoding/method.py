"""What a decoding method is to the loop: how to start, and one step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
from flax import struct

from decoding.arguments import Setting
from decoding.prefill import Observer, Prompts
from decoding.sampling import Sampling
from decoding.state import DecodeState, Hypotheses
from models.attention import Attend, dense_attend
from models.cache import KVCache
from models.decoder import Decoder


@struct.dataclass
class Call:
    """What a user may change from call to call, as arrays.

    Attributes:
        limit: i32[B], new tokens per row at most.
        keys: one random key per row.
        sampling: the rows' sampling settings.
        warm: what the method starts from (`Steps.cold`, or an earlier output's `warm`), or None.
        draft_prompts: what a draft model reads in place of the prompts, or None.
        own: the rows' values of the method's own settings (`Method.settings`), [B] each.
        grammar: where the rows stand in their grammars (`decoding.grammar.rows.Constraint`), or None.
    """

    limit: jax.Array
    keys: jax.Array
    sampling: Sampling
    warm: Any = None
    draft_prompts: Prompts | None = None
    own: dict[str, jax.Array] = struct.field(default_factory=dict)
    grammar: Any = None


@struct.dataclass
class WithDraft:
    """The parameters of a method that drafts with a second model or a trained head: pass `WithDraft(target, draft)` as
    `params`.
    """

    target: Any
    draft: Any


def target_params(params: Any) -> Any:
    """Returns the target's own parameters."""
    return params.target if isinstance(params, WithDraft) else params


class Policy(NamedTuple):
    """How the target attends.

    Attributes:
        attend: while it decodes; reads `models.attention.TreeRows`. What it leaves in their `memory` after the last
            layer is what the first layer of the next step finds there.
        init: cache -> that memory before the first step, with the prompts read.
        read: while it reads prompts, chunk by chunk; its context is None.
        keep: cache -> the form that it is kept in from the first step on.
    """

    attend: Attend = dense_attend
    init: Callable[[KVCache], Any] = lambda cache: None
    read: Attend = dense_attend
    keep: Callable[[KVCache], KVCache] = lambda cache: cache


class Tailor(NamedTuple):
    """How a method fits the target's weights to the prompts, once per call, before the first step.

    Attributes:
        observer: what it wants to see of the prompts while they are read with the whole weights.
        kernels: (target's parameters, what was seen, call) -> entries that the steps find in place of the target's own:
            a part of the tree of parameters, which `with_kernels` puts in.
    """

    observer: Observer
    kernels: Callable[[Any, Any, Call], dict[str, Any]]


def with_kernels(params: Any, kernels: dict[str, Any] | None) -> Any:
    """Returns parameters with a `Tailor`'s entries in place of the target's own; as they are where there are none."""
    if kernels is None:
        return params
    if isinstance(params, WithDraft):
        return params.replace(target=with_kernels(params.target, kernels))
    inner = {name: with_kernels(params[name], new) if isinstance(new, dict) else new for name, new in kernels.items()}
    return {**params, **inner}


class Steps(NamedTuple):
    """A method made for one model: two pure functions that are traced inside the jitted loop.

    Attributes:
        init: (params, prompts, cache, call) -> what the method keeps in `DecodeState.carry`.
        step: (params, state) -> state, with at least one token emitted by every row that is not done.
        policy: how the target attends.
        rows: cache slots that a step writes behind a row's length.
        most: A, tokens that a step emits at most per row.
        cold: () -> what stays warm between calls, as it is at first; None where nothing stays.
        warm: carry -> what stays warm between calls.
        tailor: how it fits the target's weights to the prompts; None: `step` gets the parameters of the call.
        observer: what it wants to see of the prompts while they are read; `init` finds that in `Prompts.seen`.
        found: state -> the texts that a search has found so far; None where a row has but one text.
    """

    init: Callable[[Any, Prompts, KVCache, Call], Any]
    step: Callable[[Any, DecodeState], DecodeState]
    policy: Policy = Policy()
    rows: int = 1
    most: int = 1
    cold: Callable[[], Any] = lambda: None
    warm: Callable[[Any], Any] = lambda carry: None
    tailor: Tailor | None = None
    observer: Observer | None = None
    found: Callable[[DecodeState], Hypotheses | None] = lambda state: None

    @property
    def looks_on(self) -> Observer | None:
        """What is to be seen of the prompts, which the method must then read itself; None: nothing."""
        return self.observer or (self.tailor and self.tailor.observer)


Label = Literal["exact", "distribution", "lossy"]


class Method(NamedTuple):
    """A row of the registry.

    Attributes:
        label: `exact` (the tokens of plain greedy decoding; where it samples, the law of plain sampling),
            `distribution` (samples by default, with the law of plain sampling), or `lossy`; with the default options
            (`label_of`).
        options: frozen dataclass of the method's static options.
        make: (model, options, stop_tokens) -> Steps.
        temperature: the default of calls that give none; None: the method does not sample at all.
        drafts: whether it drafts with a second model: `options.draft` is then that model, `params` a `WithDraft`.
        head: whether a trained head goes with it: where it drafts with a second model an acceptance head of that, which
            may be left out; else a draft head of the model itself: `params` is then `WithDraft(target, DraftHead)`.
        encoders: whether it also decodes models that read prompts with an encoder.
        grammars: whether its calls take grammars.
        shared: whether the rows of a batch share a choice, so that a row's text depends on who shares its batch.
        settings: what users set beside `options` without compiling anew: a number for all rows or one per row, given
            to `make_decode_fn` or to a call.
    """

    label: Label
    options: type
    make: Callable[[Decoder, Any, tuple[int, ...]], Steps]
    temperature: float | None = None
    drafts: bool = False
    head: bool = False
    encoders: bool = False
    grammars: bool = False
    shared: bool = False
    settings: Mapping[str, Setting] = MappingProxyType({})

    def label_of(self, options: Any) -> Label:
        """Returns the label with some options: one of them (`options.lossy`) may give up what the method keeps."""
        return "lossy" if getattr(options, "lossy", False) else self.label

    @property
    def paired(self) -> bool:
        """Whether `params` is a `WithDraft`."""
        return self.drafts or self.head

    @property
    def own_head(self) -> bool:
        """Whether it drafts with a head of the model itself."""
        return self.head and not self.drafts
