"""A learned scorer of quality: does a text read like those of a trusted reference? (Yi, 2403.04652, section 2.)

The paper's classifier tells pages from Wikipedia's; it does not print which. Here: logistic regression on hashed words
and pairs of words (as fastText's scorers are), the reference's texts on one side, the corpus as it reaches the stage on
the other. The lowest share of scores is dropped. The threshold is that of the population which is judged.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, vstack
from scipy.special import expit

from finetune.cleaning.stage import Stage, Verdict, words_of
from models.errors import InputError

_BUCKETS = 2**16


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """How texts are scored.

    Attributes:
        reference: a .jsonl file of good texts, of the same column as the corpus.
        drop: share of the texts that is dropped, those with the lowest scores; 0 to below 1.
        penalty: weight of the squared coefficients.
    """

    reference: Path = Path("reference.jsonl")
    drop: float = 0.1
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or self.penalty <= 0:
            raise InputError(f"drop must be 0 to below 1 and penalty above 0, got {self.drop} and {self.penalty}")


def features(texts: Sequence[str]) -> csr_matrix:
    """Returns f64[texts, 65536]: hashed counts of words and pairs of words, each row of length 1 (0 without a word)."""
    columns, ends = [], [0]
    for text in texts:
        words = words_of(text)
        grams = [*words, *(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))]
        columns += [zlib.crc32(gram.encode("utf-8", "surrogatepass")) % _BUCKETS for gram in grams]
        ends.append(len(columns))
    counts = csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(texts), _BUCKETS))
    counts.sum_duplicates()
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    counts.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(counts.indptr))
    return counts


def fit(good: csr_matrix, other: csr_matrix, penalty: float) -> np.ndarray:
    """Returns f64[features + 1], coefficients and offset: both sides count alike, whatever their sizes."""
    x = vstack([good, other]).tocsr()
    sign = np.repeat([1.0, -1.0], [good.shape[0], other.shape[0]])
    weight = np.where(sign > 0, 0.5 / good.shape[0], 0.5 / other.shape[0])

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w[:-1] + w[-1])
        slope = -weight * sign * expit(-margin)
        gradient = np.append(x.T @ slope + penalty * w[:-1], slope.sum())
        return float(weight @ np.logaddexp(0, -margin) + 0.5 * penalty * w[:-1] @ w[:-1]), gradient

    return minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def scores(x: csr_matrix, coefficients: np.ndarray) -> np.ndarray:
    """Returns f64[texts]: the probability that a text is of the reference."""
    return expit(x @ coefficients[:-1] + coefficients[-1])


def quality_stage(config: QualityConfig, reference: Sequence[str]) -> Stage:
    """Returns the stage: texts with the lowest scores are dropped, as many as `config.drop` says.

    Args:
        config: how texts are scored.
        reference: good texts, at least one.

    Raises:
        InputError: no reference.
    """
    if not reference:
        raise InputError(f"{config.reference} has no texts to tell good ones by")

    def decide(shards: Sequence[csr_matrix]) -> list[list[bool]]:
        together = vstack(list(shards)).tocsr()
        if not together.shape[0]:
            return [[] for _ in shards]
        found = scores(together, fit(features(reference), together, config.penalty))
        stays = np.ones(len(found), bool)
        stays[np.argsort(found, kind="stable")[: int(config.drop * len(found))]] = False
        flags = iter(stays.tolist())
        return [[next(flags) for _ in range(shard.shape[0])] for shard in shards]

    def apply(texts: Sequence[str], stays: Any) -> list[Verdict]:
        return [Verdict(text) if keep else Verdict(None, "low score") for text, keep in zip(texts, stays, strict=True)]

    settings = (config, zlib.crc32("\0".join(reference).encode("utf-8", "surrogatepass")))
    return Stage("quality", settings, apply, features, decide)
