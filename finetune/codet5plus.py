"""CodeT5+ (2305.07922): one encoder-decoder for code that learns several tasks at once, with equal weights.

Stage 1, of code alone, and stage 2, of pairs of a text and a function:

    denoise        write the spans of words that are missing from the code that is read (section 3.1)
    suffix         read [CLM] and the beginning, write the rest
    complete       read [CLM] alone, write everything
    contrastive    vectors of a text and of its function are to be alike, and unlike those of all others: of the batch
                   and of the last K pairs, as a slow copy of the encoder sees them (section 3.2; `finetune.momentum`)
    match          the decoder reads [Match] and a function beside the encoded text, and is to tell from the end of text
                   whether they belong together; two wrong pairs for each right one, of the batch, drawn by likeness
    text_to_code   read the text, write the function behind [CDec]
    code_to_text   read the function, write the text behind [TDec]

A batch is rows of a model with an encoder: `source` is the text, the row its start token, the function, the end of
text. What is drawn at random follows from the seed, the update and the row itself, and no row is cut.

Deviations. The temperature is a setting, and there are no soft targets (the paper names neither; both are in ALBEF,
whose losses these are). Queues begin empty and are masked until they are full, where ALBEF begins with random vectors.
Negatives for matching come from the batch, as vectors alone cannot be decoded. Pairs with an equal text or an equal
function are nobody's negatives. All losses see the same rows, in one update; the paper's first updates, of denoising
alone, are a run of their own. Texts that are compared have [CLS] in front, those that are read for writing have not.

Axis letters: B rows, S tokens that are read, T tokens that are written, K entries of the queue, E width of a vector,
D model width, V vocabulary.
"""

import dataclasses
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from finetune import denoising
from finetune.code_losses import Text, behind, contrastive_loss, matching_loss, writing_loss, wrong_pairs
from finetune.denoising import Specials, Split
from finetune.momentum import Queue, Vectors, check_queue, empty_queue, enqueue, follow
from finetune.objectives import BatchObjective
from models.encoder_decoder import EncoderDecoder, Network
from models.errors import InputError, unknown_name
from models.weights.tokenizer import Tokenizer

LOSSES: dict[str, tuple[str, ...]] = {  # and the special tokens that each needs
    "denoise": ("sentinels", "end"),
    "suffix": ("clm", "end"),
    "complete": ("clm", "end"),
    "contrastive": ("cls",),
    "match": ("cls", "match", "end"),
    "text_to_code": ("code", "end"),
    "code_to_text": ("text", "end"),
}
_COMPARED = ("contrastive", "match")
_SLOW = ("encoder", "projection", "embedding", "positions")


@dataclasses.dataclass(frozen=True)
class CodeT5PlusConfig:
    """CodeT5+'s losses.

    Attributes:
        losses: which, each with weight 1.
        queue: pairs whose vectors are kept as negatives; a multiple of the batch.
        momentum: of the slow copy of the encoder, per update.
        temperature: that likenesses are divided by.
        hard_negatives: whether wrong pairs for matching are drawn by likeness; False: all equally likely.
        corrupted: share of the tokens that denoising takes out.
        longest_span: words of a span, at most.
        seed: of what is taken out, where texts are cut, and of wrong pairs.
    """

    type: Literal["codet5plus"] = "codet5plus"
    losses: tuple[str, ...] = ("contrastive", "match", "text_to_code", "code_to_text")
    queue: int = 256
    momentum: float = 0.995
    temperature: float = 0.07
    hard_negatives: bool = True
    corrupted: float = 0.15
    longest_span: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.losses:
            if name not in LOSSES:
                raise unknown_name("loss of codet5plus", name, LOSSES)
        if not self.losses or len(set(self.losses)) != len(self.losses):
            raise InputError(f"losses must name at least one, each once; got {list(self.losses)}")
        if not 0 <= self.momentum <= 1 or not self.temperature > 0 or not 0 < self.corrupted < 1:
            raise InputError(
                "momentum must be 0 to 1, temperature above 0 and corrupted between 0 and 1, got "
                f"{self.momentum}, {self.temperature} and {self.corrupted}"
            )
        if self.queue < 1 or self.longest_span < 1 or self.seed < 0:
            raise InputError("queue and longest_span must be at least 1, and seed at least 0")


@struct.dataclass
class CodeBatch:
    """What the losses read; on the host with an axis of 1 in front.

    Attributes:
        text: what describes each function.
        code: the functions, with the end of text.
        keys: i32[B, 2]: equal texts, and equal functions, have equal keys.
        split: what is read and what is written for each loss that writes, by its name.
    """

    text: Text
    code: Text
    keys: Any
    split: dict[str, tuple[Text, Text]]


@struct.dataclass
class Own:
    """The objective's own state: the slow copy of the encoder's parameters, the queue, i32[] updates made."""

    slow: Any
    queue: Queue
    updates: jax.Array


def codet5plus(
    config: CodeT5PlusConfig, model: Network, tokenizer: Tokenizer | None, lengths: tuple[int, int] | None
) -> BatchObjective:
    """Returns CodeT5+'s losses as one objective; each is logged by its name, `loss` is their sum.

    Args:
        config: which losses.
        model: with an encoder; for contrastive training with vectors, for matching with its head.
        tokenizer: of the model.
        lengths: tokens of the longest text and of the longest row: what all batches are padded to.

    Raises:
        InputError: a model that lacks what a loss needs, or a tokenizer without its special tokens.
    """
    compared = [name for name in config.losses if name in _COMPARED]
    if not isinstance(model, EncoderDecoder) or model.config.reads_only:
        raise InputError("codet5plus trains a model with an encoder and a decoder: choose one, or set encoder_layers")
    if compared and model.config.embedding_width is None:
        raise InputError(f"{compared[0]} needs a model that gives vectors for texts: set embedding_width")
    if "match" in compared and not model.config.matching:
        raise InputError("match needs a model with a head that matches texts: set matching")
    if tokenizer is None or lengths is None:
        raise InputError("codet5plus needs the model's tokenizer and the rows' lengths: pass tokenizer and lengths")
    specials = denoising.special_tokens(tokenizer, tuple({role for loss in config.losses for role in LOSSES[loss]}))
    words = denoising.word_table(tokenizer) if "denoise" in config.losses else None
    width = model.config.embedding_width or 1

    def prepare(batch: Any, updates: int) -> CodeBatch:
        return prepare_batch(config, specials, words, batch, updates, lengths)

    def start(params: Any) -> Any:
        if not compared:
            return {}
        slow = jax.tree.map(jnp.copy, slow_part(params))
        return Own(slow, empty_queue(config.queue, width), jnp.zeros((), jnp.int32))

    def loss(params: Any, own: Any, batch: CodeBatch) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        figures, left = {}, None
        if compared:
            figures, left = compare(config, specials, model, params, own, batch)
        for name, (source, target) in batch.split.items():
            first = {"text_to_code": specials.code, "code_to_text": specials.text}.get(name, model.config.start_token)
            figures[name] = writing_loss(model, params, source, target, first)
        total = sum(figures[name] for name in config.losses)
        tokens = sum((jnp.sum(target.lengths) for _, target in batch.split.values()), jnp.sum(batch.code.lengths))
        return total, figures | {"tokens": tokens.astype(jnp.float32)}, left

    def after(own: Any, params: Any, left: Any) -> Any:
        if not compared:
            return own
        return Own(follow(own.slow, slow_part(params), config.momentum), enqueue(own.queue, left), own.updates + 1)

    return BatchObjective(prepare, start, loss, after)


def slow_part(params: Any) -> Any:
    """Returns the parameters that give vectors for texts: encoder, projection, and what embeds its tokens."""
    kept = {name: params[name] for name in _SLOW if name in params}
    embedding = {name: params["decoder"][name] for name in _SLOW if name in params["decoder"]}
    return kept | {"decoder": embedding}


def prepare_batch(
    config: CodeT5PlusConfig,
    specials: Specials,
    words: denoising.Words | None,
    batch: Any,
    updates: int,
    widths: tuple[int, int],
) -> CodeBatch:
    """Returns what the losses read of a batch of numpy arrays [1, B, ...], padded to `widths`, of texts and of rows.

    Raises:
        InputError: several micro-batches, rows without what an encoder reads, or a function without its end.
    """
    if batch.source is None:
        raise InputError("codet5plus needs pairs of a text and its code: take data with prompts and completions")
    if batch.tokens.shape[0] != 1:
        raise InputError(f"codet5plus compares all rows of an update: set accumulate to 1, not {batch.tokens.shape[0]}")
    lengths, (read, wide) = (batch.segments[0] > 0).sum(-1), widths
    codes = [row[1:length] for row, length in zip(batch.tokens[0], lengths, strict=True)]
    texts = [row[:length] for row, length in zip(batch.source.tokens[0], batch.source.lengths[0], strict=True)]
    for code in codes:
        if len(code) and code[-1] != specials.end:
            raise InputError("a row has no end of text behind its code: the end token must be the last of every row")
    keys = np.array([[_key(text), _key(code)] for text, code in zip(texts, codes, strict=True)], np.int32)
    splits = {}
    for name in config.losses:
        if name in _COMPARED:
            continue
        made = []
        for text, code, key in zip(texts, codes, keys[:, 1], strict=True):
            rng = np.random.default_rng([config.seed, updates, int(key) & 0xFFFFFFFF, list(LOSSES).index(name)])
            made.append(_split(name, config, specials, words, text, code[:-1], rng) if len(code) else Split([], []))
        swapped = name == "code_to_text"
        sides = (wide, read + 1) if swapped else (read if name == "text_to_code" else wide, wide)
        splits[name] = (
            _padded([one.source for one in made], sides[0]),
            _padded([one.target for one in made], sides[1]),
        )
    return CodeBatch(_padded(texts, read), _padded(codes, wide), keys[None], splits)


def _split(name, config, specials, words, text, code, rng) -> Split:
    """Returns what is read and written of a text and of its code, ids without an end."""
    if name == "denoise":
        return denoising.corrupt(code, words.starts(code), specials, rng, config.corrupted, config.longest_span)
    if name == "suffix":
        return denoising.split(code, specials, rng)
    if name == "complete":
        return denoising.complete(code, specials)
    pair = (text, code) if name == "text_to_code" else (code, text)
    return Split(pair[0].tolist(), [*pair[1].tolist(), specials.end])


def _key(tokens: np.ndarray) -> int:
    return int(np.uint32(zlib.crc32(tokens.astype(np.int32).tobytes())).astype(np.int32))


def _padded(rows: list[Any], width: int) -> Text:
    tokens = np.zeros((1, len(rows), width), np.int32)
    for place, row in enumerate(rows):
        tokens[0, place, : len(row)] = row
    return Text(tokens, np.array([[len(row) for row in rows]], np.int32))


def compare(
    config: CodeT5PlusConfig, specials: Specials, model: EncoderDecoder, params: Any, own: Own, batch: CodeBatch
) -> tuple[dict[str, jax.Array], Vectors]:
    """Returns the losses that compare texts with code, and what the batch adds to the queue."""
    check_queue(config.queue, len(batch.keys))
    text, code = behind(specials.cls, batch.text), behind(specials.cls, batch.code)
    valid = batch.code.lengths > 0

    def vectors(params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        read = [model.apply({"params": params}, *side, method="output") for side in (text, code)]
        texts, codes = (model.apply({"params": params}, x, method="vector") for x in read)
        return texts, codes, read[0]

    texts, codes, read = vectors(params)
    slow = jax.lax.stop_gradient(vectors(own.slow)[:2])
    new = Vectors(*slow, batch.keys, valid)
    figures = {}
    if "contrastive" in config.losses:
        figures |= contrastive_loss(texts, codes, new, own.queue, config.temperature)
    if "match" in config.losses:
        likeness = jax.lax.stop_gradient((texts @ codes.T) / config.temperature)
        key = jax.random.fold_in(jax.random.key(config.seed), own.updates)
        likeness = likeness if config.hard_negatives else jnp.zeros_like(likeness)
        wrong = wrong_pairs(likeness, new, key)
        figures |= matching_loss(model, params, read, text.lengths, behind(specials.match, batch.code), new, wrong)
    return figures, new
