"""Entropy Adaptive Decoding: a small and a large model of one vocabulary take turns, by how certain the text is. Lossy.

Source: "EAD: Entropy Adaptive Decoding, Dynamic Model Switching for Efficient Inference" (2502.06833). The mean entropy
of the writing model's laws over the last `window` tokens, in bits and before any sampling setting, decides: at
`threshold` or above the large model writes on, below it the small one, and a model that took over writes `dwell` tokens
at least. Nothing is verified.

The paper leaves open, and here: the small model starts by default; a window that is not yet full is averaged over what
there is; an entropy equal to the threshold calls the large model; a model that rests does not read along, and takes up
what it missed in passes of `CATCH_UP` tokens when it is called (`eager` lets the small model read along, for the same
text). `random_share` is a control that the paper has not: blocks of `dwell` tokens go to the large model at random.

In the counts, `drafted` and `accepted` are the tokens that the small model wrote; passes that catch up are counted.

Axis letters: B batch, T tokens of a pass, N room for new tokens, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from decoding.autoregressive import SampleCarry, choose
from decoding.method import Call, Method, Steps, WithDraft
from decoding.prefill import Prompts, prefill, prompt_tokens
from decoding.sampling import step_keys
from decoding.speculative.draft_model import check_draft
from decoding.state import DecodeState, emit
from models.cache import KVCache, commit
from models.decoder import Decoder, next_positions
from models.errors import InputError

CATCH_UP = 16  # tokens that a pass of a model that lags behind reads at most
_SWITCH = 0xEAD  # folds a step's key for the random control


@dataclasses.dataclass(frozen=True)
class EntropyAdaptiveOptions:
    """The small model; the threshold in bits, tokens of the window, tokens between two switches at least.

    Attributes:
        draft: the small model; it must be given.
        threshold: bits; `inf` never calls the large model, `-inf` always.
        window: tokens whose entropies are averaged.
        dwell: tokens between two switches at least.
        start: which model writes first.
        eager: the small model reads along while it rests.
        random_share: share of tokens that the large model writes, in place of the threshold; None: the threshold rules.
    """

    draft: Decoder | None = None
    threshold: float = 0.5
    window: int = 5
    dwell: int = 10
    start: Literal["small", "large"] = "small"
    eager: bool = False
    random_share: float | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise InputError("threshold must be a number of bits, inf or -inf; got nan")
        if self.window < 1 or self.dwell < 0:
            raise InputError(f"window must be at least 1 and dwell at least 0, got {self.window} and {self.dwell}")
        if self.start not in ("small", "large"):
            raise InputError(f"start must be small or large, got {self.start!r}")
        if self.random_share is not None and not (0 <= self.random_share <= 1 and self.dwell >= 1):
            raise InputError(f"random_share must be 0 to 1, with dwell at least 1; got {self.random_share}")


@struct.dataclass
class EntropyCarry:
    """What the method keeps.

    Attributes:
        small: the small model's cache; it lacks what the model did not read while it rested, as the large one's does.
        prompt: i32[B], the prompts' last tokens.
        offset: i32[B], their positions.
        large: bool[B], whether the large model wrote the newest token.
        since: i32[B], tokens written since the last switch.
        entropies: f32[B, window], bits, newest first.
        sample: what sampling keeps.
    """

    small: KVCache
    prompt: jax.Array
    offset: jax.Array
    large: jax.Array
    since: jax.Array
    entropies: jax.Array
    sample: SampleCarry


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the entropy in bits, f32[B], of the law that logits f32[B, V] stand for."""
    log_law = jax.nn.log_softmax(logits, axis=-1)
    law = jnp.exp(log_law)
    return -jnp.where(law > 0, law * log_law, 0.0).sum(axis=-1) / math.log(2)


def read_text(
    model: Decoder, params: Any, cache: KVCache, text: jax.Array, newest: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array]:
    """Reads what the cache lacks of the text, the newest token last.

    Args:
        model: the network.
        params: its parameters.
        cache: holds the text up to some token before the newest.
        text: i32[B, S], tokens by position, as far as the cache may lack them.
        newest: i32[B], the newest token's position.
        wanted: bool[B], rows that are to be read; the others stay as they are.

    Returns:
        (f32[B, V] logits behind the newest token, zeros for rows not wanted; the cache; i32[B] passes per row).
    """

    def lacking(cache: KVCache) -> jax.Array:
        return jnp.where(wanted, newest + 1 - cache.length, 0)

    def pending(most: int, carry) -> jax.Array:
        return (lacking(carry[0]) > most).any()

    def one_pass(width: int, carry):
        cache, logits, passes = carry
        place = cache.length[:, None] + jnp.arange(width)[None, :]
        tokens = jnp.take_along_axis(text, jnp.clip(place, 0, text.shape[1] - 1), axis=1)
        count = jnp.minimum(lacking(cache), width)

        def forward(module, tokens):
            positions = next_positions(tokens, cache)
            x, _, written, _ = module.layers(module.embed(tokens, positions), positions, cache)
            last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
            return module.unembed(last)[:, 0], written

        behind, cache = model.apply({"params": params}, tokens, method=forward)
        logits = jnp.where((count > 0)[:, None], behind, logits)
        return commit(cache, None, count), logits, passes + (count > 0).astype(jnp.int32)

    carry = cache, jnp.zeros((len(newest), model.config.vocab_size), jnp.float32), jnp.zeros_like(newest)
    for width, most in ((CATCH_UP, 1), (1, 0)):  # loops, since `lax.cond` would copy the cache
        carry = jax.lax.while_loop(functools.partial(pending, most), functools.partial(one_pass, width), carry)
    cache, logits, passes = carry
    return logits, cache, passes


def with_writer(carry: EntropyCarry, lengths: jax.Array, options: EntropyAdaptiveOptions) -> EntropyCarry:
    """Returns the carry with the model that writes the next token of each row; `lengths` i32[B] tokens are new."""
    if options.random_share is None:
        filled = jnp.clip(lengths, 1, options.window).astype(jnp.float32)
        due = (carry.since >= options.dwell) & (lengths > 0)
        called = carry.entropies.sum(axis=1) / filled >= options.threshold
    else:
        keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys(carry.sample.keys, lengths), _SWITCH)
        due = lengths % options.dwell == 0
        called = jax.vmap(jax.random.uniform)(keys) < options.random_share
    large = jnp.where(due, called, carry.large)
    return carry.replace(large=large, since=jnp.where(large != carry.large, 0, carry.since))


def make_entropy_adaptive(model: Decoder, options: EntropyAdaptiveOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Lets `options.draft`, the small model, and `model`, the large one, take turns."""
    small_model = check_draft(model, options.draft, "entropy_adaptive")

    def init(params: WithDraft, prompts: Prompts, cache: KVCache, call: Call) -> EntropyCarry:
        if call.draft_prompts is not None:
            raise InputError("both models of 'entropy_adaptive' write one text: leave out draft_prompts and contexts")
        small = prefill(small_model, params.draft, prompts, cache.num_slots)
        return _first_carry(small, prompts, call, model.config.vocab_size, options)

    def step(params: WithDraft, state: DecodeState) -> DecodeState:
        carry = with_writer(state.carry, state.lengths, options)
        newest = carry.offset + state.lengths
        text = _by_position(carry, state.tokens, state.cache.num_slots)
        by_large = carry.large & ~state.done
        by_small = ~carry.large & ~state.done
        reading = ~state.done if options.eager else by_small
        behind_large, cache, target_calls = read_text(model, params.target, state.cache, text, newest, by_large)
        behind_small, small, draft_calls = read_text(small_model, params.draft, carry.small, text, newest, reading)
        logits = jnp.where(carry.large[:, None], behind_large, behind_small)
        token, sample = choose(logits, carry.sample, state.lengths)
        entropies = jnp.concatenate([entropy(logits)[:, None], carry.entropies[:, :-1]], axis=1)
        carry = carry.replace(small=small, since=carry.since + 1, entropies=entropies, sample=sample)
        after = emit(state.replace(cache=cache, carry=carry), token[:, None], jnp.ones_like(token), stop_tokens)
        written = by_small.astype(jnp.int32)
        stats = after.stats.replace(
            drafted=after.stats.drafted + written,
            accepted=after.stats.accepted + written,
            target_calls=state.stats.target_calls + target_calls,
            draft_calls=after.stats.draft_calls + draft_calls,
        )
        return after.replace(stats=stats)

    return Steps(init, step, rows=CATCH_UP)


def _first_carry(
    small: KVCache, prompts: Prompts, call: Call, vocab_size: int, options: EntropyAdaptiveOptions
) -> EntropyCarry:
    batch = len(prompts.lengths)
    return EntropyCarry(
        small=small,
        prompt=jnp.take_along_axis(prompts.tokens, prompts.lengths[:, None] - 1, axis=1)[:, 0],
        offset=prompts.lengths - 1,
        large=jnp.full((batch,), options.start == "large"),
        since=jnp.zeros((batch,), jnp.int32),
        entropies=jnp.zeros((batch, options.window), jnp.float32),
        sample=SampleCarry(call.sampling, call.keys, prompt_tokens(prompts, vocab_size)),
    )


def _by_position(carry: EntropyCarry, tokens: jax.Array, slots: int) -> jax.Array:
    """Returns i32[B, S]: prompts' last tokens and new tokens i32[B, N] at their positions; 0 before them."""
    place = jnp.arange(slots)[None, :] - carry.offset[:, None]
    new = jnp.take_along_axis(tokens, jnp.clip(place - 1, 0, tokens.shape[1] - 1), axis=1)
    return jnp.where(place == 0, carry.prompt[:, None], jnp.where(place > 0, new, 0))


ENTROPY_ADAPTIVE = Method("lossy", EntropyAdaptiveOptions, make_entropy_adaptive, temperature=0.0, drafts=True)
