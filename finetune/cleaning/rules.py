"""Heuristic rules: what a text must not be, read off the text alone (Yi, 2403.04652, section 2: heuristic filters).

The report prints no thresholds; the defaults are those of the rules it builds on (Gopher, 2112.11446, table A1), for
English. E-mail addresses and telephone numbers are masked in what is kept.
"""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from finetune.cleaning.stage import Stage, Verdict
from models.errors import InputError

_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_BULLETS = ("-", "*", "•", "‣", "·")
_ENDS = ("...", "…")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_PHONE = re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)|\d{2,4})[ .-]\d{3,4}[ .-]\d{3,4}(?!\w)")
MASKS = ((_EMAIL, "<email>"), (_PHONE, "<phone>"))


@dataclasses.dataclass(frozen=True)
class RulesConfig:
    """Thresholds; shares are of 1.

    Attributes:
        min_words: fewest words of a text.
        max_words: most words.
        min_word_length: characters of a word, on average.
        max_word_length: the same.
        max_symbols: "#" and "..." for each word.
        max_bullets: share of lines that begin with a bullet.
        max_ellipses: share of lines that end with an ellipsis.
        min_alphabetic: share of words with a letter.
        min_stop_words: of the eight commonest English words that the rule knows; 0 for other languages.
        max_garbled: share of characters that are replacements, controls, or of no known kind.
        max_repeated_lines: share of lines that stood before; also of paragraphs.
        max_repeated_characters: the same, by characters.
        max_top_ngram: share of characters in the commonest 2-, 3- and 4-gram of words.
        max_repeated_ngrams: share of characters in 5- to 10-grams of words that stand more than once.
        blocked_words: texts with any of them are dropped, whole words in any case.
        mask: whether addresses and numbers are masked.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullets: float = 0.9
    max_ellipses: float = 0.3
    min_alphabetic: float = 0.8
    min_stop_words: int = 2
    max_garbled: float = 0.01
    max_repeated_lines: float = 0.3
    max_repeated_characters: float = 0.2
    max_top_ngram: tuple[float, ...] = (0.20, 0.18, 0.16)
    max_repeated_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    blocked_words: tuple[str, ...] = ()
    mask: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise InputError(f"min_words must be 0 to max_words, got {self.min_words} and {self.max_words}")
        if len(self.max_top_ngram) != 3 or len(self.max_repeated_ngrams) != 6:
            raise InputError("max_top_ngram needs 3 shares (2- to 4-grams), max_repeated_ngrams 6 (5- to 10-grams)")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _share(hits: int, of: int) -> float:
    return hits / of if of else 0.0


def _repeated(parts: Sequence[str]) -> tuple[float, float]:
    """Returns (share of parts, share of characters) that stood before."""
    again = [part for part, count in Counter(parts).items() for _ in range(count - 1)]
    return _share(len(again), len(parts)), _share(sum(map(len, again)), sum(map(len, parts)))


def _top_ngram(words: Sequence[str], n: int) -> float:
    """Returns the share of characters in the commonest n-gram, where it stands more than once."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    if not counts:
        return 0.0
    gram, count = max(counts.items(), key=lambda item: (item[1], sum(map(len, item[0]))))
    return _share(count * sum(map(len, gram)), sum(map(len, words))) if count > 1 else 0.0


def _repeated_ngrams(words: Sequence[str], n: int) -> float:
    """Returns the share of characters in words that an n-gram covers which stands more than once."""
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    counts = Counter(grams)
    covered = {i + j for i, gram in enumerate(grams) if counts[gram] > 1 for j in range(n)}
    return _share(sum(len(words[i]) for i in covered), sum(map(len, words)))


def _is_garbled(character: str) -> bool:
    return character == "\ufffd" or (
        unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") and character not in "\n\r\t"
    )


def _repetitious(text: str, config: RulesConfig) -> bool:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    found = [_repeated(_lines(text)), _repeated(paragraphs)]
    return any(n > config.max_repeated_lines or c > config.max_repeated_characters for n, c in found)


def _ngrams(text: str, config: RulesConfig) -> bool:
    words = text.split()
    return any(_top_ngram(words, n) > most for n, most in enumerate(config.max_top_ngram, 2)) or any(
        _repeated_ngrams(words, n) > most for n, most in enumerate(config.max_repeated_ngrams, 5)
    )


def _word_length(text: str, config: RulesConfig) -> bool:
    words = text.split()
    return not config.min_word_length <= _share(sum(map(len, words)), len(words)) <= config.max_word_length


def _marked_lines(text: str, config: RulesConfig) -> bool:
    lines = _lines(text)
    bullets, ellipses = (sum(map(test, lines)) for test in (_is_bullet, _is_unfinished))
    return _share(bullets, len(lines)) > config.max_bullets or _share(ellipses, len(lines)) > config.max_ellipses


def _is_bullet(line: str) -> bool:
    return line.startswith(_BULLETS)


def _is_unfinished(line: str) -> bool:
    return line.endswith(_ENDS)


def _symbols(text: str, config: RulesConfig) -> bool:
    count = text.count("#") + text.count("...") + text.count("…")
    return _share(count, len(text.split())) > config.max_symbols


def _alphabetic(text: str, config: RulesConfig) -> bool:
    words = text.split()
    return _share(sum(any(map(str.isalpha, word)) for word in words), len(words)) < config.min_alphabetic


def _stop_words(text: str, config: RulesConfig) -> bool:
    return len(_STOP_WORDS & set(text.lower().split())) < config.min_stop_words


def _blocked(text: str, config: RulesConfig) -> bool:
    words = set(re.findall(r"\w+", text.lower()))
    return any(word.lower() in words for word in config.blocked_words)


RULES: dict[str, Callable[[str, RulesConfig], bool]] = {
    "length": lambda text, config: not config.min_words <= len(text.split()) <= config.max_words,
    "garbled": lambda text, config: _share(sum(map(_is_garbled, text)), len(text)) > config.max_garbled,
    "blocked words": _blocked,
    "word length": _word_length,
    "symbols": _symbols,
    "bullets and ellipses": _marked_lines,
    "words without letters": _alphabetic,
    "stop words": _stop_words,
    "repeated lines": _repetitious,
    "repeated n-grams": _ngrams,
}


def broken_rule(text: str, config: RulesConfig) -> str:
    """Returns the name of the first rule that a text breaks, "" where it keeps all."""
    return next((name for name, breaks in RULES.items() if breaks(text, config)), "")


def mask(text: str) -> str:
    """Returns the text with `<email>` and `<phone>` in place of addresses and numbers."""
    for pattern, name in MASKS:
        text = pattern.sub(name, text)
    return text


def rules_stage(config: RulesConfig) -> Stage:
    """Returns the stage: texts that break a rule are dropped, with its name as the reason."""

    def apply(texts: Sequence[str], decision: Any) -> list[Verdict]:
        broken = [broken_rule(text, config) for text in texts]
        kept = (mask(text) if config.mask else text for text in texts)
        return [Verdict(None, rule) if rule else Verdict(text) for text, rule in zip(kept, broken, strict=True)]

    return Stage("rules", config, apply)
