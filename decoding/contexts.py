"""Contexts of prompts as embeddings: given as such, or as texts that a compressor reads (`models.dolphin`).

A prompt says with the id `SLOT` where its context stands; one that does not say has it in front. Each slot becomes N
places of the prompt, which count like tokens.

Axis letters: B batch, P tokens of a padded context, N embeddings of a context, D width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decoding.method import WithDraft
from decoding.prefill import Prompts, pad_prompts, read_tokens
from models.cache import commit, init_cache
from models.decoder import Decoder, Inserted
from models.dolphin import Dolphin
from models.encoder_decoder import Network
from models.errors import InputError

SLOT = -1  # stands in a prompt where its context is to stand


@struct.dataclass
class Contexts:
    """What is inserted into prompts.

    Attributes:
        read: texts for the compressor, or their embeddings, [B, N, D].
        start: i32[B], the place of the first embedding in each prompt.
    """

    read: Prompts | jax.Array
    start: jax.Array


def writer(model: Network | Dolphin) -> Network:
    """Returns the network that writes."""
    return model.writer if isinstance(model, Dolphin) else model


def writer_params(model: Network | Dolphin, params: Any) -> Any:
    """Returns the parameters of the network that writes; what a method drafts with stays beside them."""
    if not isinstance(model, Dolphin):
        return params
    return params.replace(target=params.target["main"]) if isinstance(params, WithDraft) else params["main"]


def with_memory(model: Network | Dolphin, params: Any, prompts: Prompts) -> Prompts:
    """Returns prompts whose contexts have become embeddings; as they are where they have none. Pure.

    Args:
        model: the model of a decode function.
        params: its parameters, a `WithDraft` among them.
        prompts: as `read_contexts` gives them.
    """
    if prompts.inserted is None:
        return prompts
    contexts = prompts.inserted
    values = contexts.read
    if isinstance(values, Prompts):
        values = compress(model, params.target if isinstance(params, WithDraft) else params, values)
    return prompts.replace(inserted=Inserted(values, contexts.start))


def compress(model: Dolphin, params: Any, contexts: Prompts) -> jax.Array:
    """Returns the memory of contexts, [B, N, D]; long ones are read in pieces. Pure."""
    reader, table = model.reader, params["compressor"]["embedding"]["embedding"]
    slots = contexts.tokens.shape[1] + model.config.memory
    layers = [block.attention for block in reader.config.blocks]
    cache = init_cache(layers, len(contexts.lengths), slots, table.dtype)
    cache = read_tokens(reader, params["compressor"], contexts.tokens, cache, contexts.lengths.max())
    return model.apply({"params": params}, commit(cache, None, contexts.lengths), method="digest")


_compress = jax.jit(compress, static_argnums=0)


def memory_of(model: Dolphin, params: Any, contexts: Sequence[Sequence[int]]) -> jax.Array:
    """Returns the memory of contexts, [B, N, D]: made once, it can be given to many calls in place of the texts.

    Args:
        model: the pair.
        params: its parameters.
        contexts: B lists of ids of the compressor's tokenizer.

    Raises:
        InputError: an empty context, one longer than the compressor reads, or ids of another tokenizer.
    """
    return _compress(model, params, _read_texts(model, contexts))


def read_contexts(
    model: Network | Dolphin, prompts: Sequence[Sequence[int]], contexts: Any, drafts_alone: bool
) -> Prompts:
    """Returns the padded batch of prompts, with room for their contexts and these beside it.

    Args:
        model: the model of a decode function.
        prompts: B lists of token ids, of which one may be `SLOT`.
        contexts: B lists of ids of the compressor's tokenizer, or f[B, N, D] embeddings; None: no contexts.
        drafts_alone: whether a draft model would read these prompts, in which there is nothing of the context.

    Raises:
        InputError: contexts that do not belong to these prompts or this model, or what `pad_prompts` raises.
    """
    vocab_size = writer(model).config.vocab_size
    if contexts is None:
        return pad_prompts(prompts, vocab_size)
    if not isinstance(model, Decoder | Dolphin):
        raise InputError("contexts are for decoder-only models; this one reads its prompts with an encoder")
    if drafts_alone:
        raise InputError("the draft model cannot read the memory of contexts: give it whole texts, draft_prompts")
    read = _read(model, contexts)
    given = len(read.lengths) if isinstance(read, Prompts) else len(read)
    try:
        prompts = list(prompts)
    except TypeError:
        raise InputError(f"prompts must be lists of token ids, got {prompts!r:.80}") from None
    if given != len(prompts):
        raise InputError(f"contexts must be as many as the {len(prompts)} prompts, one for each; got {given}")
    count = model.config.memory if isinstance(read, Prompts) else read.shape[1]
    placed = [_with_room(index, prompt, count) for index, prompt in enumerate(prompts)]
    padded = pad_prompts([prompt for prompt, _ in placed], vocab_size)
    return padded.replace(inserted=Contexts(read, np.array([start for _, start in placed], np.int32)))


def encode_with_slot(tokenizer: Any, text: str, mark: str, add_special: bool = True) -> list[int]:
    """Returns the ids of a text with `SLOT` in place of the first mark; in front where there is none."""
    before, found, after = text.partition(mark)
    if not found:
        return [SLOT, *tokenizer.encode(text, add_special=add_special)]
    return [*tokenizer.encode(before, add_special=add_special), SLOT, *tokenizer.encode(after, add_special=False)]


def _read(model: Decoder | Dolphin, contexts: Any) -> Prompts | jax.Array:
    """Returns contexts as a padded batch, or as embeddings."""
    if getattr(contexts, "ndim", None) == 3:
        width = writer(model).config.width
        if contexts.shape[1] < 1 or contexts.shape[2] != width or not jnp.issubdtype(contexts.dtype, jnp.floating):
            raise InputError(
                f"embedded contexts must be floats [prompts, embeddings, {width}], got {contexts.dtype} of shape "
                f"{contexts.shape}: were they made for another model?"
            )
        return contexts
    if not isinstance(model, Dolphin):
        raise InputError(
            "this model has no compressor to read contexts with: put them into the prompts, give their embeddings "
            "[prompts, embeddings, width], or decode with a models.dolphin.Dolphin"
        )
    return _read_texts(model, contexts)


def _read_texts(model: Dolphin, contexts: Any) -> Prompts:
    try:
        padded = pad_prompts(contexts, model.config.compressor.vocab_size)
    except InputError as error:
        raise InputError(f"contexts, read as the compressor's: {error}") from error
    if padded.lengths.max() > model.config.longest:
        raise InputError(
            f"the longest context has {padded.lengths.max()} tokens, the compressor reads "
            f"{model.config.longest} and its {model.config.memory} memory tokens at most: shorten it, or use a "
            "compressor with a longer context"
        )
    return padded


def _with_room(index: int, prompt: Any, count: int) -> tuple[list[int], int]:
    """Returns a prompt with `count` places for its context, and the first of them."""
    try:
        prompt = list(prompt)
    except TypeError as error:
        raise InputError(f"prompt {index} must be a list of token ids, got {prompt!r:.80}") from error
    slots = prompt.count(SLOT)
    if slots > 1 or (prompt and prompt[-1] == SLOT):
        raise InputError(
            f"prompt {index} must hold one context and go on behind it: {slots} of its ids are {SLOT}, the last "
            f"id is {prompt[-1]}"
        )
    start = prompt.index(SLOT) if slots else 0
    rest = prompt[start + slots :]
    return [*prompt[:start], *[0] * (count if rest else 0), *rest], start
