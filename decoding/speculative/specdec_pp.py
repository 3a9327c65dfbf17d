"""SpecDec++: a chain from a draft model that ends where a rejection has become likely.

Source: "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths" (2405.19715). Whether to draft one
more token is a Markov decision; the best rule stops once the chance that some drafted token will be rejected exceeds a
threshold. A head on the draft's last hidden state (`models.acceptance_head`) predicts each token's chance of being
accepted, and drafting stops when 1 - product of these > `threshold`.

The head reads a hidden state that the draft has only after reading the token, so that after drawing token s the product
is over tokens 1 to s - 1 (the newest token of the text is the first that the draft reads; it is verified, and its
prediction means nothing). Whether to go on thus depends on tokens that stay in the chain, never on one that could still
be dropped: the verifier is the usual one and the text's law that of the target, whatever the head says.

`stop="entropy"` is the untrained control, after AdaEDL (2410.18351): a token drawn from a law q counts as accepted with
at least max(0, 1 - sqrt(0.2 H(q))), H the entropy in nats. The law is known before the draw, so that here the product
is over tokens 1 to s. AdaEDL itself compares the newest token's bound alone with a threshold that it adapts.

The target reads the smallest of a few fixed numbers of rows (`drafter.sizes_below`) that holds the longest chain of the
batch.

Axis letters: B batch, N = `longest`, V vocabulary.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

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
from decoding.speculative.drafter import Drafter, Round, Seen, sizes_below
from decoding.speculative.loop import make_speculative
from decoding.speculative.tree import chain
from models.acceptance_head import AcceptanceHead, log_accept, read_hidden
from models.cache import KVCache, commit
from models.decoder import Decoder
from models.errors import InputError, unknown_name

_STOPS = ("head", "entropy")
_GAMMA = 0.2  # AdaEDL's factor on the entropy


@struct.dataclass
class WithHead:
    """A draft model's parameters with its acceptance head: pass `WithDraft(target, WithHead(draft, head, depth))`.

    Attributes:
        model: the draft's parameters.
        head: the head's parameters.
        depth: how often the head applies its block.
    """

    model: Any
    head: Any
    depth: int = struct.field(pytree_node=False, default=3)


@dataclasses.dataclass(frozen=True)
class SpecDecPPOptions(DraftOptions):
    """What predicts acceptance, the chance of a rejection above which drafting stops (0: as early as may be; 1: never),
    and tokens drafted per step at least (but for a stop token) and at most.
    """

    stop: Literal["head", "entropy"] = "head"
    threshold: float = 0.7
    shortest: int = 2
    longest: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop not in _STOPS:
            raise unknown_name("stop rule", self.stop, _STOPS)
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold is a probability, 0 to 1; got {self.threshold}")
        if not 1 <= self.shortest <= self.longest:
            raise InputError(
                f"shortest must be at least 1 and longest at least shortest, got {self.shortest} and {self.longest}"
            )


@struct.dataclass
class Chain:
    """Chains under construction.

    Attributes:
        cache: the draft's, with every token of the chain that it has read.
        tokens: i32[B, N + 1], the newest token of the text and the drafted ones.
        laws: f32[B, N, V] that these were drawn from.
        length: i32[B], tokens drafted.
        going: bool[B], rows that draft on.
        log_kept: f32[B], log of the predicted chance that all of them are accepted.
    """

    cache: KVCache
    tokens: jax.Array
    laws: jax.Array
    length: jax.Array
    going: jax.Array
    log_kept: jax.Array


@struct.dataclass
class SpecDecPPState:
    """The draft's stream, and i32[B]: tokens drafted in this step."""

    stream: DraftStream
    length: jax.Array


def log_bound(law: jax.Array) -> jax.Array:
    """Returns the log of the entropy's bound on acceptance, f32[B], for laws f32[B, V]."""
    entropy = -jnp.sum(jnp.where(law > 0, law * jnp.log(jnp.where(law > 0, law, 1.0)), 0.0), axis=-1)
    return jnp.log(jnp.maximum(1.0 - jnp.sqrt(_GAMMA * jnp.maximum(entropy, 0.0)), 0.0))


def split_params(params: Any, stop: str) -> tuple[Any, WithHead | None]:
    """Returns the draft's own parameters, and what comes with the head; raises InputError where one is too many."""
    if (stop == "head") != isinstance(params, WithHead):
        wanted = (
            "WithDraft(target, WithHead(draft, head)) as params (--head FILE on the command line)"
            if stop == "head"
            else "WithDraft(target, draft) as params, without a head"
        )
        other = next(rule for rule in _STOPS if rule != stop)
        raise InputError(f"method 'specdec_pp' with stop={stop!r} takes {wanted}; or use stop={other!r}")
    return (params.model, params) if stop == "head" else (params, None)


def with_next(
    so_far: Chain,
    logits: jax.Array,
    log_read: jax.Array,
    round_: Round,
    step: jax.Array,
    options: SpecDecPPOptions,
    stop_tokens: tuple[int, ...],
) -> Chain:
    """Returns the chains with one token more in the rows that draft on.

    Args:
        so_far: the chains.
        logits: f32[B, V], the draft's behind their last tokens.
        log_read: f32[B], the head's log-chance that the last token is accepted; 0 where that is sure.
        round_: what the drafter may look at.
        step: i32[], tokens drafted so far.
        options: temperature, stop rule and lengths.
        stop_tokens: ids that end a chain.
    """
    token, law = draw_next(logits, round_, step, options.draft_temperature)
    log_kept = so_far.log_kept + (log_bound(law) if options.stop == "entropy" else log_read)
    enough = (-jnp.expm1(log_kept) > options.threshold) & (step + 1 >= options.shortest)
    ended = enough | jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32))
    return so_far.replace(
        tokens=so_far.tokens.at[:, step + 1].set(token),
        laws=so_far.laws.at[:, step].set(law),
        length=so_far.length + so_far.going.astype(jnp.int32),
        going=so_far.going & ~ended,
        log_kept=log_kept,
    )


def make_specdec_pp(model: Decoder, options: SpecDecPPOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Drafts a chain of `options.shortest` to `options.longest` tokens with `options.draft`."""
    draft = check_draft(model, options.draft, "specdec_pp")
    template = chain(options.longest)

    def init(params: Any, prompts: Prompts, slots: int, call: Call) -> SpecDecPPState:
        own, _ = split_params(params.draft, options.stop)
        return SpecDecPPState(start_stream(draft, own, prompts, slots), jnp.zeros_like(prompts.lengths))

    def propose(params: Any, state: SpecDecPPState, round_: Round):
        own, head = split_params(params.draft, options.stop)
        zero = jnp.zeros(round_.last.shape, jnp.float32)

        def extend(carry: tuple[jax.Array, Chain]) -> tuple[jax.Array, Chain]:
            step, so_far = carry
            token = jnp.take(so_far.tokens, step, axis=1)
            logits, hidden, cache = draft.apply({"params": own}, token[:, None], so_far.cache, method=read_hidden)
            cache = commit(cache, None, so_far.going.astype(jnp.int32))
            log_read = zero
            if head is not None:
                log_read = log_accept(AcceptanceHead(head.depth).apply({"params": head.head}, hidden[:, 0]))
            return step + 1, with_next(
                so_far.replace(cache=cache), logits[:, 0], log_read, round_, step, options, stop_tokens
            )

        logits, stream = read_newest(draft, own, state.stream, round_)
        tokens = jnp.zeros((len(zero), template.width), jnp.int32).at[:, 0].set(round_.last)
        laws = jnp.zeros((len(zero), options.longest, logits.shape[1]), jnp.float32)
        begin = Chain(stream.cache, tokens, laws, jnp.zeros_like(round_.last), ~round_.done, zero)
        first = with_next(begin, logits, zero, round_, jnp.zeros((), jnp.int32), options, stop_tokens)
        _, whole = jax.lax.while_loop(
            lambda carry: (carry[0] < options.longest) & carry[1].going.any(), extend, (jnp.ones((), jnp.int32), first)
        )
        alive = jnp.arange(template.width)[None, :] <= whole.length[:, None]
        tree = template.tree(whole.tokens, whole.laws)
        tree = tree.replace(parent=jnp.where(alive, tree.parent, -1))
        stream = stream.replace(cache=whole.cache.replace(length=stream.cache.length))
        return tree, SpecDecPPState(stream, whole.length), whole.length, whole.length

    def observe(params: Any, state: SpecDecPPState, seen: Seen) -> SpecDecPPState:
        return state.replace(stream=keep(state.stream, seen.verified, seen.verified.tokens, state.length))

    smaller = tuple(size for size in sizes_below(template.width) if size > options.shortest)
    drafter = Drafter(template.width, template.width, "rrs_wor", init, propose, observe, smaller=smaller)
    return make_speculative(model, drafter, stop_tokens)


SPECDEC_PP = Method("exact", SpecDecPPOptions, make_specdec_pp, temperature=0.0, drafts=True, head=True)
