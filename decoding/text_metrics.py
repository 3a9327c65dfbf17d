"""How varied generated texts are, and how much of them is copied: figures of token ids alone.

A text is what was generated, without its prompt. Texts of different lengths or tokenizers do not compare: shorter texts
have fewer chances to repeat. Give all methods the same number of new tokens and no stop tokens, or say how long texts
are (`text_figures` does). An empty text has no say. Where there is nothing to count a figure is nan.

Sources: type-token ratio and longest overlap as in hyperfitting (2412.04318), distinct-n as in diverse beam search
(1610.02424), rep-n and diversity as in contrastive search (2202.06417, 2210.14140), self-BLEU as in Texygen
(1802.01886).
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Texts = Sequence[Sequence[int]]
NAN = float("nan")


def text_figures(texts: Texts, corpus: Texts = ()) -> dict[str, float]:
    """Returns all figures of generated texts by name, for a row of a table.

    Args:
        texts: what was generated.
        corpus: texts that the model was trained on; none: no figures of overlap.
    """
    figures = {
        "tokens": _mean([len(text) for text in texts]),
        "type_token_ratio": type_token_ratio(texts),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3, 4)},
        **{f"rep_{n}": rep_n(texts, n) for n in (2, 3, 4)},
        "diversity": diversity(texts),
        "self_bleu": self_bleu(texts),
    }
    if len(corpus):
        overlaps = longest_overlaps(texts, corpus)
        figures |= {"overlap_mean": _mean(overlaps), "overlap_max": float(max(overlaps, default=NAN))}
    return figures


def type_token_ratio(texts: Texts) -> float:
    """Returns the mean over texts of different tokens / tokens, in (0, 1]: 1 where no token comes twice."""
    return _mean([len(_ngrams(text, 1)) / len(text) for text in texts if len(text)])


def distinct_n(texts: Texts, n: int) -> float:
    """Returns the different n-grams of all texts together / the tokens of all texts, in [0, 1]."""
    found = {gram for text in texts for gram in _ngrams(text, n)}
    return _ratio(len(found), sum(len(text) for text in texts))


def rep_n(texts: Texts, n: int) -> float:
    """Returns the share of n-grams that came before in their own text, in [0, 1]: 1 - different / all.

    Counts are added up over texts before the division, so that long texts weigh more. The released code of 2202.06417
    does so too; it counts words, and not the last n-gram of a text.
    """
    counts = [_ngrams(text, n) for text in texts]
    return 1.0 - _ratio(sum(map(len, counts)), sum(count.total() for count in counts))


def diversity(texts: Texts) -> float:
    """Returns the product of 1 - rep-n for n of 2, 3 and 4, in [0, 1]."""
    return math.prod(1.0 - rep_n(texts, n) for n in (2, 3, 4))


def self_bleu(texts: Texts, n: int = 4) -> float:
    """Returns the mean BLEU of each text against all others, in [0, 1]: high where texts resemble each other.

    BLEU with equal weights for 1- to n-grams. A count of 0 for longer n-grams becomes 0.1 (method 1 of Chen and Cherry,
    2014), as is usual for single texts.

    Args:
        texts: two or more.
        n: the longest n-gram.
    """
    texts = [text for text in texts if len(text)]
    if len(texts) < 2:
        return NAN
    lengths = np.array([len(text) for text in texts])
    logs = np.zeros(len(texts))
    for size in range(1, n + 1):
        counts = [_ngrams(text, size) for text in texts]
        most = _highest_counts(counts)
        for row, own in enumerate(counts):
            kept = sum(min(count, _elsewhere(most[gram], row)) for gram, count in own.items())
            smallest = 0.0 if size == 1 else 0.1
            with np.errstate(divide="ignore"):  # a text without a token of the others has BLEU 0
                logs[row] += np.log((kept or smallest) / max(own.total(), 1)) / n
    for row, length in enumerate(lengths):
        others = np.delete(lengths, row)
        closest = others[np.lexsort((others, np.abs(others - length)))[0]]
        logs[row] += min(0.0, 1.0 - closest / length)  # the brevity penalty
    return float(np.exp(logs).mean())


def longest_overlaps(texts: Texts, corpus: Texts) -> list[int]:
    """Returns for each text the length of its longest run of tokens that also stands in a text of the corpus.

    Runs grow by one token a round. A place stays in as long as the run that starts there is found on the other side;
    runs are told apart by numbers given out in each round, not by a hash, so the answer is exact.
    """
    sources = [*texts, *corpus]
    if not any(len(text) for text in texts):
        return [0] * len(texts)
    tokens = np.concatenate([np.asarray(text, np.int64) for text in sources])
    lengths = np.array([len(text) for text in sources])
    owner = np.repeat(np.arange(len(sources)), lengths)
    end = np.repeat(np.cumsum(lengths), lengths)
    starts, runs, size = np.arange(len(tokens)), np.zeros(len(tokens), np.int64), 0
    longest = np.zeros(len(texts), int)
    while True:
        fits = starts + size < end[starts]
        starts, runs = starts[fits], runs[fits]
        keys = runs * (tokens.max() + 1) + tokens[starts + size]
        different, runs = np.unique(keys, return_inverse=True)
        generated = owner[starts] < len(texts)
        sides = np.zeros((2, len(different)), bool)
        sides[generated.astype(int), runs] = True
        shared = sides.all(axis=0)[runs]
        size += 1
        longest[owner[starts[shared & generated]]] = size
        if not shared.any():
            return longest.tolist()
        starts, runs = starts[shared], runs[shared]


def _ngrams(text: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    """Returns how often each n-gram stands in a text; none where it is shorter than n."""
    tokens = np.asarray(text).tolist()
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _highest_counts(counts: Sequence[Counter]) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """Returns {n-gram: (highest count in a text, that text, highest count in another text)}."""
    most: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for row, own in enumerate(counts):
        for gram, count in own.items():
            best, holder, second = most.get(gram, (0, row, 0))
            most[gram] = (count, row, best) if count > best else (best, holder, max(second, count))
    return most


def _elsewhere(most: tuple[int, int, int], row: int) -> int:
    """Returns an n-gram's highest count in a text other than `row`."""
    best, holder, second = most
    return second if holder == row else best


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else NAN


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else NAN


def unigram_divergence(texts: Texts, others: Texts) -> float:
    """Returns the Jensen-Shannon divergence, in bits, between the tokens of some texts and those of others, in [0, 1].

    0 where every token has the same share on both sides: a coarse, model-free stand-in for measures that compare two
    sides by clusters of their embeddings (MAUVE, 2102.01454). Small samples diverge by chance alone.
    """
    counts = [Counter(token for text in side for token in np.asarray(text).tolist()) for side in (texts, others)]
    totals = [own.total() for own in counts]
    if not all(totals):
        return NAN
    laws = np.array(
        [[own[token] / all_ for own, all_ in zip(counts, totals, strict=True)] for token in {*counts[0], *counts[1]}]
    )
    middle = laws.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(laws > 0, laws * np.log2(laws / middle), 0.0)
    return float(parts.sum() / 2)
