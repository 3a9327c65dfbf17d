"""Near copies of whole texts, by MinHash (Yi, 2403.04652, section 2; the procedure of RefinedWeb, 2306.01116, G.3.1).

Texts are sets of word n-grams. `bands` x `rows` hash functions: two texts of similarity s meet in some band with
probability 1 - (1 - s^rows)^bands, and are copies where the estimate of s from all functions is `threshold` or more.
Copies of copies are one group, of which the longest text stays (of equal ones the one with the least hash), whatever
the order of the texts. Hashing and banding are datasketch's.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH

from finetune.cleaning.stage import Stage, Verdict, words_of
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class NearCopiesConfig:
    """How near copies are found.

    Attributes:
        ngram: words of a shingle; a shorter text is one shingle.
        bands: bands of hash functions; RefinedWeb: 20.
        rows: functions of a band; RefinedWeb: 450, which costs 9000 hashes a shingle.
        threshold: estimated Jaccard similarity from which two texts are copies.
        seed: of the hash functions.
    """

    ngram: int = 5
    bands: int = 20
    rows: int = 10
    threshold: float = 0.75
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.ngram, self.rows) < 1 or self.bands < 2:
            raise InputError("ngram and rows must be at least 1, and bands at least 2")
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold must be above 0 and at most 1, got {self.threshold}")


class Signatures(NamedTuple):
    """What is kept of n texts: u64[n, bands * rows] least hashes, words of each, and a hash of each text."""

    hashes: np.ndarray
    lengths: list[int]
    names: list[str]


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def shingles(text: str, n: int) -> set[str]:
    """Returns the word n-grams of a text; of a shorter one, the whole."""
    words = words_of(text)
    return {" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def _minhash(config: NearCopiesConfig, hashes: np.ndarray | None = None) -> MinHash:
    return MinHash(config.bands * config.rows, config.seed, hashfunc=_hash, hashvalues=hashes, scheme="affine64")


def signatures(texts: Sequence[str], config: NearCopiesConfig) -> Signatures:
    """Returns the signatures of texts."""
    empty, hashes = _minhash(config), []
    for text in texts:
        one = empty.copy()
        one.update_batch([shingle.encode() for shingle in sorted(shingles(text, config.ngram))])
        hashes.append(one.hashvalues)
    shape = (len(texts), config.bands * config.rows)
    names = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in texts]
    return Signatures(np.asarray(hashes).reshape(shape), [len(words_of(text)) for text in texts], names)


def groups(found: Signatures, config: NearCopiesConfig) -> list[int]:
    """Returns, for each text, the number of the text that stands for its group."""
    parent = list(range(len(found.names)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[bytes, int] = {}
    index = MinHashLSH(num_perm=config.bands * config.rows, params=(config.bands, config.rows))
    for number, hashes in enumerate(found.hashes):
        same = first.setdefault(hashes.tobytes(), number)
        if same != number:
            parent[root(number)] = root(same)
            continue
        one = _minhash(config, hashes)
        for other in index.query(one):
            if np.mean(found.hashes[other] == hashes) >= config.threshold:
                parent[root(number)] = root(other)
        index.insert(number, one)
    best: dict[int, int] = {}
    for number in range(len(parent)):
        key = root(number)
        best[key] = min(best.get(key, number), number, key=lambda i: (-found.lengths[i], found.names[i], i))
    return [best[root(number)] for number in range(len(parent))]


def near_copies_stage(config: NearCopiesConfig) -> Stage:
    """Returns the stage: of each group of copies one text stays."""

    def decide(shards: Sequence[Signatures]) -> list[list[bool]]:
        together = Signatures(
            np.concatenate([shard.hashes for shard in shards]),
            [length for shard in shards for length in shard.lengths],
            [name for shard in shards for name in shard.names],
        )
        stays = iter([number == best for number, best in enumerate(groups(together, config))])
        return [[next(stays) for _ in shard.names] for shard in shards]

    def apply(texts: Sequence[str], stays: Any) -> list[Verdict]:
        return [Verdict(text) if keep else Verdict(None, "near copy") for text, keep in zip(texts, stays, strict=True)]

    return Stage("near_copies", config, apply, lambda texts: signatures(texts, config), decide)
