"""A vocabulary for the tiny model, random grammars over it, and brute-force matchers that know no automaton."""

import functools
import itertools
import random
import re

import numpy as np

from decoding.grammar import Vocabulary

SINGLE = [char.encode() for char in 'abcdexyz0123456789+-*()[]{}",:. \n']
SEVERAL = [b"ab", b"ba", b"aab", b"cc", b"10", b"01", b"12", b" a", b'":', b'{"', b"true", b"((", b"))", b"+1"]
BYTES = ["é".encode(), b"\xc3", b"\xa9", b"\xd0", b"\xb6", b"\xe2\x82", b"\xac", "x€".encode()]
STOP = 60


@functools.cache
def small_vocabulary() -> Vocabulary:
    """Returns 61 tokens: characters, several at once, parts of characters, ids without text, and `STOP`."""
    tokens = [*SINGLE, *SEVERAL, *BYTES]
    assert len(set(tokens)) == len(tokens) < STOP
    return Vocabulary([*tokens, *[None] * (61 - len(tokens))])


def text_of(tokens: list[int]) -> bytes:
    """Returns the bytes of ids, a stop token at the end left out."""
    return b"".join(small_vocabulary().tokens[token] for token in tokens if token != STOP)


def random_pattern(seed: int, depth: int = 3) -> str:
    """Returns a regular expression that Python's `re` and Rust's regex library read alike."""
    rng = random.Random(seed)

    def part(depth: int) -> str:
        kind = rng.choice(["text", "class"] if depth == 0 else ["text", "class", "either", "join", "join", "repeat"])
        if kind == "text":
            return rng.choice(["a", "ab", "é", "x€", "c", "10", "ж"])
        if kind == "class":
            return rng.choice(["[abc]", "[0-9]", "[xé]", "[a-e]"])
        if kind == "repeat":
            return f"(?:{part(depth - 1)})" + rng.choice(["*", "?", "+", "{1,3}", "*?", "{2}"])
        parts = [part(depth - 1) for _ in range(rng.randint(2, 3))]
        return f"(?:{'|'.join(parts)})" if kind == "either" else "".join(parts)

    return part(depth)


def words_up_to(pattern: str, letters: str, most: int) -> set[bytes]:
    """Returns all texts over some letters, `most` of them at most, that an expression matches: by trying them all."""
    compiled = re.compile(pattern)
    texts = ("".join(chars) for num in range(most + 1) for chars in itertools.product(letters, repeat=num))
    return {text.encode() for text in texts if compiled.fullmatch(text)}


def brute_mask(words: set[bytes], text: bytes) -> tuple[np.ndarray, bool]:
    """Returns (bool[V] tokens behind which a word of a finite language can still come, whether the text is a word)."""
    vocabulary = small_vocabulary()
    begins = {word[:end] for word in words for end in range(len(word) + 1)}
    allowed = [token is not None and text + token in begins for token in vocabulary.tokens]
    return np.array(allowed), text in words
