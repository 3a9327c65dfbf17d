"""Prompts into fixed shapes, and into the cache.

Ragged prompts are padded on the right to one of a few bucket lengths, so that a new length inside a bucket compiles
nothing. The keys of padding end up in stale slots behind each row's length and are overwritten by the tokens that
follow.

Axis letters: B batch, P bucket length, S cache slots, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from models.attention import Attend, dense_attend
from models.cache import KVCache, commit, init_cache
from models.decoder import Decoder, Inserted
from models.encoder_decoder import EncoderDecoder
from models.errors import InputError

CHUNK = 512  # tokens that one prefill pass takes at most: bounds the memory of attention scores
SMALLEST_BUCKET = 16


@struct.dataclass
class Prompts:
    """A padded batch: tokens i32[B, P] (0 from `lengths` on) and lengths i32[B], 1 to P; what the method's `Observer`
    has seen of them; and the embeddings that stand in place of some of them (which are then 0), or what these are to
    come from (`decoding.contexts`).
    """

    tokens: jax.Array
    lengths: jax.Array
    seen: Any = None
    inserted: Any = None


class Observer(NamedTuple):
    """What to note of the activations while prompts are read; pure functions.

    Attributes:
        first: prompts -> what has been seen before the first token.
        add: (seen, acts, real) -> what has been seen after T more tokens per row. `real`, bool[B, T], tells tokens of
            the prompts from padding.
        of: what `acts` are. `inner`: for each layer the [B, T, F] that enter its MLP's down projection; `hidden`: the
            [B, T, D] behind the last block.
    """

    first: Callable[[Prompts], Any]
    add: Callable[[Any, Any, jax.Array], Any]
    of: Literal["inner", "hidden"] = "inner"


def hidden_observer(width: int) -> Observer:
    """Returns what collects (f32[B, P, D], i32[] tokens so far) of prompts: the states behind the last block."""

    def first(prompts: Prompts) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((*prompts.tokens.shape, width), jnp.float32), jnp.zeros((), jnp.int32)

    def add(seen: tuple[jax.Array, jax.Array], acts: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        states, start = seen
        states = jax.lax.dynamic_update_slice_in_dim(states, acts.astype(jnp.float32), start, axis=1)
        return states, start + acts.shape[1]

    return Observer(first, add, "hidden")


def bucket_length(length: int) -> int:
    """Returns the bucket for a prompt of `length` tokens: the next power of two, 16 at least."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def pad_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> Prompts:
    """Returns the batch, padded to its bucket.

    Raises:
        InputError: no prompts, an empty prompt, or an id that the model has no embedding for.
    """
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array) or len(prompts) == 0:
        raise InputError("no prompts: pass a list with at least one list of token ids")
    rows = [_read_row(index, prompt, vocab_size) for index, prompt in enumerate(prompts)]
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket_length(int(lengths.max()))), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: row.size] = row
    return Prompts(tokens, lengths)


def _read_row(index: int, prompt: Sequence[int], vocab_size: int) -> np.ndarray:
    try:
        row = np.asarray(prompt)
    except ValueError:  # lists of different lengths
        row = np.asarray(None)
    if row.size == 0 and row.ndim == 1:
        raise InputError(f"prompt {index} is empty: a prompt needs at least one token (the BOS token will do)")
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise InputError(f"prompt {index} must be a list of token ids, got {prompt!r:.80}: encode text first")
    for token in (row.min(), row.max()):
        if not 0 <= token < vocab_size:
            raise InputError(
                f"prompt {index} has token id {token}, but the model has ids 0 to {vocab_size - 1}: was it encoded "
                "with another model's tokenizer?"
            )
    return row


def prompt_tokens(prompts: Prompts, vocab_size: int) -> jax.Array:
    """Returns bool[B, V]: which tokens occur in each row's prompt."""
    batch, width = prompts.tokens.shape
    places = jnp.broadcast_to(jnp.arange(width)[None, :], (batch, width))
    real = places < prompts.lengths[:, None]
    if prompts.inserted is not None:
        real &= ~prompts.inserted.within(places)
    seen = jnp.zeros((batch, vocab_size), bool)
    return seen.at[jnp.arange(batch)[:, None], prompts.tokens].max(real)


def prefill(model: Decoder, params: Any, prompts: Prompts, num_slots: int, attend: Attend = dense_attend) -> KVCache:
    """Returns a cache of `num_slots` slots that holds every prompt but its last token, read as `attend` says.

    The last token stays out, like the newest token in every later step: the first step of decoding reads it.
    """
    return observed_prefill(model, params, prompts, num_slots, attend)[0]


def observed_prefill(
    model: Decoder,
    params: Any,
    prompts: Prompts,
    num_slots: int,
    attend: Attend = dense_attend,
    observer: Observer | None = None,
) -> tuple[KVCache, Any]:
    """Returns the cache of `prefill`, and what an observer has seen of all tokens of the prompts, the last included.

    Prompts longer than `CHUNK` come to the observer chunk by chunk.
    """
    dtype = params["embedding"]["embedding"].dtype
    cache = init_cache([block.attention for block in model.config.blocks], len(prompts.lengths), num_slots, dtype)
    if observer is None:
        cache = read_tokens(model, params, prompts.tokens, cache, prompts.lengths.max() - 1, attend, prompts.inserted)
        return commit(cache, None, prompts.lengths - 1), None

    def add(seen, acts, start, width):
        places = start + jnp.arange(width)
        return observer.add(seen, acts, places[None, :] < prompts.lengths[:, None])

    seen = observer.first(prompts)
    longest, inserted = prompts.lengths.max(), prompts.inserted
    cache, seen = _read(model, params, prompts.tokens, cache, longest, attend, inserted, seen, add, observer.of)
    return commit(cache, None, prompts.lengths - 1), seen


def encode_prompts(model: EncoderDecoder, params: Any, prompts: Prompts, num_slots: int) -> tuple[KVCache, Prompts]:
    """Returns a cache with the prompts in the encoder's form and room for `num_slots` tokens, and what is written so
    far: one start token per row.
    """
    batch, stack = len(prompts.lengths), model.config.decoder
    encoded = model.apply({"params": params}, prompts.tokens, prompts.lengths, method="encode")
    dtype = params["decoder"]["embedding"]["embedding"].dtype
    cache = init_cache([block.attention for block in stack.blocks], batch, num_slots, dtype)
    first = jnp.full((batch, 1), model.config.start_token, jnp.int32)
    return cache.replace(encoded=encoded), Prompts(first, jnp.ones((batch,), jnp.int32))


def read_tokens(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    cache: KVCache,
    longest: jax.Array | int,
    attend: Attend = dense_attend,
    inserted: Inserted | None = None,
) -> KVCache:
    """Writes the keys and values of tokens behind each row's length; the lengths stay.

    Args:
        model: the network.
        params: its parameters.
        tokens: i32[B, P]; P is at most `CHUNK`, or a multiple of it.
        cache: the cache before them.
        longest: i32[], how many of the P tokens are wanted, from the first on.
        attend: the attention policy; it gets `CHUNK` tokens at a time, and no context.
        inserted: embeddings that stand in place of some of the tokens.
    """
    return _read(model, params, tokens, cache, longest, attend, inserted)[0]


def _read(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    cache: KVCache,
    longest: jax.Array | int,
    attend: Attend,
    inserted: Inserted | None = None,
    seen: Any = None,
    add: Callable[[Any, Any, jax.Array | int, int], Any] | None = None,
    of: str | None = None,
) -> tuple[KVCache, Any]:
    """Does what `read_tokens` says, and lets `add(seen, acts, place of the first token, T)` see `of` what is read."""
    if tokens.shape[1] <= CHUNK:
        cache, acts = _fill(model, params, tokens, cache, attend, inserted, of)
        return cache, seen if add is None else add(seen, acts, 0, tokens.shape[1])
    num_chunks = (longest + CHUNK - 1) // CHUNK
    length = cache.length

    def fill_chunk(index, carry):
        cache, seen = carry
        chunk = jax.lax.dynamic_slice_in_dim(tokens, index * CHUNK, CHUNK, axis=1)
        before = cache.replace(length=length + index * CHUNK)
        cache, acts = _fill(model, params, chunk, before, attend, inserted, of)
        return cache, seen if add is None else add(seen, acts, index * CHUNK, CHUNK)

    cache, seen = jax.lax.fori_loop(0, num_chunks, fill_chunk, (cache, seen))
    return cache.replace(length=length), seen


def _fill(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    cache: KVCache,
    attend: Attend,
    inserted: Inserted | None,
    of: str | None,
) -> tuple[KVCache, Any]:
    """Runs the blocks on tokens i32[B, T].

    Returns:
        The cache with their keys and values written, and what an observer sees `of` them; None where there is none.
    """
    positions = cache.length[:, None] + jnp.arange(tokens.shape[1])[None, :]

    def blocks(module, tokens):
        read = (tokens, positions) if inserted is None else inserted.at(tokens, positions)
        x, _, cache_, _ = module.layers(module.embed(*read), positions, cache, attend)
        return cache_, x if of == "hidden" else None

    if of != "inner":
        return model.apply({"params": params}, tokens, method=blocks)
    (cache, _), sown = model.apply({"params": params}, tokens, method=blocks, mutable=["intermediates"])
    layers = [sown["intermediates"][f"layers_{index}"] for index in range(model.config.num_layers)]
    return cache, tuple(layer["mlp"]["inner"][0] for layer in layers)
