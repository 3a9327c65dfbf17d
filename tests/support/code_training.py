"""A tiny model with both heads, the tokenizer `code`, and batches of pairs, for the tests of CodeT5+."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from finetune.code_pairs import code_pairs
from finetune.code_tokenizer import code_tokenizer
from models.config import AttentionConfig, BlockConfig, DecoderConfig, EncoderDecoderConfig, MLPConfig, NormConfig
from models.encoder_decoder import EncoderDecoder

ROWS, WIDE, READ = 4, 48, 28


class Source(NamedTuple):
    tokens: np.ndarray
    lengths: np.ndarray


class PairBatch(NamedTuple):
    """The fields of a batch that are read."""

    tokens: np.ndarray
    segments: np.ndarray
    source: Source


def tiny_bimodal() -> EncoderDecoder:
    """One layer each, width 16, vectors of 8."""
    attention = AttentionConfig(2, 2, 8)
    norm = NormConfig("rms", 1e-5)
    block = BlockConfig(attention, MLPConfig(24), norm)
    cross = dataclasses.replace(block, cross=dataclasses.replace(attention, rope=None))
    encoder = DecoderConfig("llama", code_tokenizer().vocab_size, 16, (block,), 128, norm, tied_embeddings=True)
    decoder = dataclasses.replace(encoder, blocks=(cross,))
    return EncoderDecoder(EncoderDecoderConfig(encoder, decoder, embedding_width=8, matching=True))


def pair_batch(seed: int = 0, rows: int = ROWS, empty: int = 0) -> Any:
    """Returns generated pairs as numpy arrays [1, rows, ...], the last `empty` rows without anything."""
    tokenizer = code_tokenizer()
    pairs = [one for one in code_pairs(8 * rows, seed, False)]
    encoded = [
        (tokenizer.encode(one.prompt), [0, *tokenizer.encode(one.completion), tokenizer.eos_id]) for one in pairs
    ]
    fitting = [one for one in encoded if len(one[0]) <= READ and len(one[1]) <= WIDE][: rows - empty]
    tokens, segments = np.zeros((1, rows, WIDE), np.int32), np.zeros((1, rows, WIDE), np.int32)
    source, lengths = np.zeros((1, rows, READ), np.int32), np.zeros((1, rows), np.int32)
    for place, (text, code) in enumerate(fitting):
        tokens[0, place, : len(code)], segments[0, place, : len(code)] = code, 1
        source[0, place, : len(text)], lengths[0, place] = text, len(text)
    return PairBatch(tokens, segments, Source(source, lengths))
