"""What a request costs by one written formula: floating-point operations, and bytes moved to and from memory.

A pass over t tokens with s tokens in the cache multiplies each with every matrix of a block, 2 t (D (H + 2 K) Dh + H Dh
D + m D F) operations with m = 3 for gated MLPs, else 2, and meets every key, 4 H Dh t (s + t): a masked product is
computed like any other. It reads the matrices once, writes t keys and values and reads s + t. A token that is written
also needs the unembedding, D V. Norms, rotations and softmax are left out.

Axis letters: D width, H query heads, K key/value heads, Dh head width, F feed-forward width, V vocabulary.
"""

from typing import NamedTuple

from models.config import DecoderConfig, MoEConfig
from models.errors import InputError

CHUNK = 512  # tokens of a prompt that are read in one pass (`decoding.prefill`)


class Cost(NamedTuple):
    """Operations and bytes."""

    flops: float
    bytes: float

    def plus(self, other: "Cost") -> "Cost":
        """Returns the sum."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def pass_cost(config: DecoderConfig, tokens: int, held: int, written: int, itemsize: int = 4) -> Cost:
    """Returns the cost of one pass.

    Args:
        config: the decoder; its MLPs must be dense.
        tokens: t, that are read.
        held: s, in the cache.
        written: for how many of them logits are computed.
        itemsize: bytes of a number.
    """
    flops = bytes_ = 0.0
    for block in config.blocks:
        if isinstance(block.mlp, MoEConfig):
            raise InputError("the formula is for dense MLPs: choose a model without experts")
        attention, mlp = block.attention, block.mlp
        queries, keys = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads))
        matrices = config.width * (2 * queries + 2 * keys + (3 if mlp.gated else 2) * mlp.width)
        flops += 2 * tokens * matrices + 4 * queries * tokens * (held + tokens)
        bytes_ += itemsize * (matrices + 2 * keys * (held + 2 * tokens))
    table = config.width * config.vocab_size
    return Cost(flops + 2 * written * table, bytes_ + itemsize * (table if written else 0))


def reading_cost(config: DecoderConfig, tokens: int, held: int = 0, itemsize: int = 4) -> Cost:
    """Returns the cost of reading tokens in pieces, without a word written."""
    total = Cost(0.0, 0.0)
    for start in range(0, tokens, CHUNK):
        total = total.plus(pass_cost(config, min(CHUNK, tokens - start), held + start, 0, itemsize))
    return total


def request_cost(
    main: DecoderConfig,
    context: int,
    question: int,
    answer: int,
    *,
    compressor: DecoderConfig | None = None,
    memory: int = 0,
    itemsize: int = 4,
) -> Cost:
    """Returns the cost of a context with a question that is answered.

    Args:
        main: the decoder that answers.
        context: tokens.
        question: tokens, the last of which is read when the first of the answer is written.
        answer: tokens.
        compressor: reads the context in main's place; None: main reads it whole.
        memory: N, tokens that main reads in place of the context.
        itemsize: bytes of a number.
    """
    held = context if compressor is None else memory
    total = reading_cost(main, held + question - 1, itemsize=itemsize)
    if compressor is not None:
        total = total.plus(reading_cost(compressor, context, itemsize=itemsize))
        total = total.plus(pass_cost(compressor, memory, context, 0, itemsize))
    for step in range(answer):
        total = total.plus(pass_cost(main, 1, held + question - 1 + step, 1, itemsize))
    return total
