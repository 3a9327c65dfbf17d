"""What a draft model reads of a long document: the chunks that share the question's words, in document order.

For `decoding.speculative.rapid` (2502.20330, section on the RAG drafter). All of this is text; the tokens come later:

    short = shorten(document, question, tokenizer, budget=1024)
    decode_fn(params, [prompt(document)], draft_prompts=[prompt(short)])  # one template for both

Deviation: chunks are ranked by BM25 (the `bm25s` package), not by an encoder's embeddings, and no chunk is left out for
a low score.
"""

import logging
import re
from collections.abc import Callable, Sequence

from models.errors import InputError
from models.weights.tokenizer import Tokenizer

_ENDS = (  # where a text may be cut, the best places first
    r"(?<=\n\n)(?!\n)",  # paragraphs
    r"(?<=\n)",  # lines
    r"(?<=[.!?]\s)|(?<=[。！？])",  # sentences
    r"(?<=[,;:]\s)|(?<=[、，；：])",  # clauses
    r"(?<=\s)",  # words
    r"",  # characters
)


def chunks(text: str, count: Callable[[str], int], size: int) -> list[str]:
    """Returns a text in pieces that make it up again when joined.

    Cuts between paragraphs; inside a paragraph that is too long, between lines; then sentences, clauses, words, and
    characters. Neighbours stay together as long as they fit.

    Args:
        text: any text; an empty one has no chunks.
        count: the length of a piece, as it is to be limited (its tokens).
        size: the greatest `count` of a chunk, at least 1. Only a single character may be longer.

    Raises:
        InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"size must be at least 1 token, got {size}")
    return _split(text, count, size, 0) if text else []


def _split(text: str, count: Callable[[str], int], size: int, level: int) -> list[str]:
    if level == len(_ENDS) or count(text) <= size:
        return [text]
    merged: list[str] = []
    for piece in filter(None, re.split(_ENDS[level], text)):
        if merged and count(merged[-1] + piece) <= size:
            merged[-1] += piece
        else:
            merged.append(piece)
    return [part for chunk in merged for part in _split(chunk, count, size, level + 1)]


def retrieve(chunks: Sequence[str], query: str, count: int) -> list[int]:
    """Returns the indices of the `count` chunks that match a query best by BM25, ascending.

    Words count in lower case, single letters and digits too, and none is left out as too common. Of equal chunks
    (those without a word of the query, say) the first ones are taken.

    Args:
        chunks: the pieces of a document.
        query: what to look for.
        count: how many, at least 1; all of them where there are fewer.

    Raises:
        InputError: a count below 1.
    """
    if count < 1:
        raise InputError(f"count must be at least 1 chunk, got {count}")
    if count >= len(chunks):
        return list(range(len(chunks)))
    import bm25s  # its import runs JAX once
    import numpy as np

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import sets DEBUG
    words = [re.findall(r"\w+", text.lower()) for text in (*chunks, query)]
    wanted = set(words.pop()) & {word for chunk in words for word in chunk}
    if not wanted:
        return list(range(count))
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    best = np.argsort(-index.get_scores(sorted(wanted)), kind="stable")[:count]
    return sorted(best.tolist())


def shorten(document: str, question: str, tokenizer: Tokenizer, budget: int, size: int = 128) -> str:
    """Returns the chunks of a document that match a question best, in document order, a blank line between them.

    Args:
        document: the long text; one of at most `budget` tokens comes back as it is.
        question: what is asked about it.
        tokenizer: counts tokens.
        budget: tokens to keep: budget // size chunks. The blank lines come on top, a token or two each.
        size: tokens of a chunk at most, at least 1 (the paper: 512).

    Raises:
        InputError: a document without text, or a budget below one chunk.
    """

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special=False))

    if not document.strip():
        raise InputError("the document is empty: there is nothing to retrieve from")
    if budget < size:
        raise InputError(f"budget must be at least one chunk, {size} tokens, got {budget}: raise it, or lower size")
    if count(document) <= budget:
        return document
    parts = [part for part in chunks(document, count, size) if part.strip()]
    return "\n\n".join(parts[index].strip() for index in retrieve(parts, question, budget // size))
