"""How well a model of CodeT5+'s kind finds, writes and goes on with code: figures on held-out pairs.

    retrieval     each text is looked up among the functions of all: by likeness of vectors, and with the matching head
                  on the most alike added to it (2305.07922, section 4; the re-ranking of the released evaluation)
    writing       cross-entropy of the function behind its text, and the share that greedy decoding writes exactly
    completion    the decoder alone, beside [CLM]: the share of next lines that it writes exactly (section 4.3)

Axis letters: N pairs, E width of a vector.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from decoding import make_decode_fn
from finetune.code_losses import Text, behind, writing_loss
from finetune.corpus import Example
from finetune.denoising import Specials
from models.alone import decoder_alone
from models.encoder_decoder import EncoderDecoder, with_start
from models.errors import InputError
from models.weights.tokenizer import Tokenizer

_BATCH = 16  # rows that are read at once
Figures = dict[str, float]


class HeldOut(NamedTuple):
    """Pairs as ids; functions come with the end of text.

    Attributes:
        texts: N lists.
        codes: N lists.
    """

    texts: list[list[int]]
    codes: list[list[int]]


def held_out(tokenizer: Tokenizer, examples: Sequence[Example], text_length: int, code_length: int) -> HeldOut:
    """Returns the pairs that fit; raises InputError where fewer than two do."""
    pairs = [(tokenizer.encode(one.prompt), [*tokenizer.encode(one.completion), tokenizer.eos_id]) for one in examples]
    fitting = [one for one in pairs if len(one[0]) < text_length and len(one[1]) < code_length]
    if len(fitting) < 2:
        raise InputError(
            f"{len(fitting)} of {len(pairs)} pairs have at most {text_length} and {code_length} tokens: take more "
            "pairs or longer rows"
        )
    return HeldOut([text for text, _ in fitting], [code for _, code in fitting])


def padded(rows: Sequence[Sequence[int]], width: int | None = None) -> Text:
    """Returns lists of ids as one value, 0 behind each."""
    width = max(map(len, rows)) if width is None else width
    tokens = np.zeros((len(rows), width), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return Text(tokens, np.array([len(row) for row in rows], np.int32))


def _in_batches(function: Callable[..., jax.Array], *sides: Text) -> np.ndarray:
    """Returns a jitted function's values for all rows, a few rows at a time; the last are filled up."""
    count, found = len(sides[0].lengths), []
    for start in range(0, count, _BATCH):
        rows = [min(start + i, count - 1) for i in range(_BATCH)]
        part = function(*(Text(side.tokens[rows], side.lengths[rows]) for side in sides))
        found.append(np.asarray(part)[: min(_BATCH, count - start)])
    return np.concatenate(found)


def retrieval(model: EncoderDecoder, params: Any, pairs: HeldOut, specials: Specials, top: int) -> Figures:
    """Returns mean reciprocal ranks and shares of first places, of both ways to rank, each with its standard error.

    Args:
        model: that gives vectors; without a head that matches, the second ranking is left out.
        params: its parameters.
        pairs: N of them; equal functions count as right answers to each other's texts.
        specials: of its tokenizer.
        top: of the most alike functions are ranked again by the head.
    """
    embed = jax.jit(lambda side: model.apply({"params": params}, *behind(specials.cls, side), method="embed_text"))
    texts, codes = padded(pairs.texts), padded(pairs.codes)
    cosines = _in_batches(embed, texts) @ _in_batches(embed, codes).T
    right = np.array([[a == b for b in pairs.codes] for a in pairs.codes])
    figures = ranked("", cosines, right)
    if not model.config.matching:
        return figures
    top = min(top, len(pairs.codes))
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    of_text = np.repeat(np.arange(len(pairs.texts)), top)

    @jax.jit
    def match(text: Text, code: Text) -> jax.Array:
        encoded = model.apply({"params": params}, *behind(specials.cls, text), method="encode")
        judged = behind(specials.match, code)
        return model.apply({"params": params}, *judged, encoded, method="match")[:, 1]

    chosen = (Text(side.tokens[i], side.lengths[i]) for side, i in ((texts, of_text), (codes, best.ravel())))
    logits = _in_batches(match, *chosen).reshape(best.shape)
    scores = np.full(cosines.shape, -np.inf)
    np.put_along_axis(scores, best, np.take_along_axis(cosines, best, axis=1) + logits, axis=1)
    return figures | ranked("reranked/", np.where(np.isfinite(scores), scores, cosines - 1e6), right)


def ranked(prefix: str, scores: np.ndarray, right: np.ndarray) -> Figures:
    """Returns {"mrr", "recall"} of scores f[N, M] where `right` bool[N, M] says which answers are; ties count half."""
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    ranks = 1 + np.sum((scores > best) & ~right, axis=1) + 0.5 * np.sum((scores == best) & ~right, axis=1)
    figures = {"mrr": 1 / ranks, "recall": ranks == 1}
    found: Figures = {}
    for name, values in figures.items():
        found[prefix + name] = float(np.mean(values))
        found[f"{prefix}{name}/error"] = float(np.std(values) / len(values) ** 0.5)
    return found


def writing(
    model: EncoderDecoder, params: Any, pairs: HeldOut, specials: Specials, answers: int, tokens: int
) -> Figures:
    """Returns the cross-entropy of functions behind their texts, per token, and the share of `answers` that are exact.

    `tokens` is the most that an answer may have.
    """
    texts, codes = padded(pairs.texts), padded(pairs.codes)

    @jax.jit
    def loss(text: Text, code: Text) -> jax.Array:
        return jax.lax.map(lambda one: writing_loss(model, params, *_one_row(one), specials.code), (text, code))

    losses = _in_batches(loss, texts, codes)
    weights = np.array([len(code) for code in pairs.codes])
    decode = make_decode_fn(
        with_start(model, specials.code), "greedy", max_new_tokens=tokens, stop_tokens=(specials.end,)
    )
    out = decode(params, pairs.texts[:answers])
    exact = [
        np.asarray(out.tokens[row][: out.lengths[row]]).tolist() in (code, code[:-1])
        for row, code in enumerate(pairs.codes[:answers])
    ]
    figures = _share("exact", exact)
    return {"cross_entropy": float(np.sum(losses * weights) / weights.sum()), **figures}


def _one_row(pair: tuple[Text, Text]) -> tuple[Text, Text]:
    return tuple(Text(side.tokens[None], side.lengths[None]) for side in pair)


def completion(
    model: EncoderDecoder,
    params: Any,
    pairs: HeldOut,
    specials: Specials,
    tokenizer: Tokenizer,
    answers: int,
    tokens: int,
) -> Figures:
    """Returns the share of last lines that the decoder alone writes exactly, of `answers` functions at most."""
    prompts, wanted = [], []
    for code in pairs.codes[:answers]:
        breaks = [i for i, token in enumerate(code) if "\n" in tokenizer.decode([token])]
        if breaks:
            prompts.append([model.config.start_token, *code[: breaks[-1] + 1]])
            wanted.append(code[breaks[-1] + 1 : -1])
    alone, kept = decoder_alone(model, params, specials.clm)
    decode = make_decode_fn(alone, "greedy", max_new_tokens=tokens, stop_tokens=(specials.end,))
    out = decode(kept, prompts)
    written = [np.asarray(out.tokens[row][: out.lengths[row]]).tolist() for row in range(len(prompts))]
    return _share("completed", [row[: len(line)] == line and row[len(line) :] in ([], [specials.end])
                                for row, line in zip(written, wanted, strict=True)])  # fmt: skip


def _share(name: str, found: Sequence[bool]) -> Figures:
    share = sum(found) / max(len(found), 1)
    return {name: share, f"{name}/error": (share * (1 - share) / max(len(found), 1)) ** 0.5}
