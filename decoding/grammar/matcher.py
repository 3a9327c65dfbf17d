"""Where a text stands in a grammar: the protocol, and llguidance behind it.

Axis letters: V vocabulary, W words of a bitmask.
"""

from typing import Any, Protocol

import numpy as np

from decoding.grammar.bitmask import num_words
from decoding.grammar.vocabulary import Vocabulary


class GrammarMatcher(Protocol):
    """A text that grows token by token inside a grammar."""

    def reset(self) -> None:
        """Goes back to the empty text."""

    def fill(self, words: np.ndarray) -> bool:
        """Writes the tokens that may come next to u32[W]; returns whether the text may end here."""

    def consume(self, token: int) -> bool:
        """Adds a token; returns False, with the text as it was, where the grammar does not allow it."""

    def rollback(self, count: int) -> None:
        """Takes the last `count` tokens away again."""


class EngineMatcher:
    """A matcher of llguidance: context-free grammars, JSON Schemas and regular expressions."""

    def __init__(self, vocabulary: Vocabulary, compiled: str):
        """Starts with the empty text; `compiled` is a grammar in llguidance's own form, known to be valid."""
        import llguidance

        self.size = vocabulary.size
        self._matcher: Any = llguidance.LLMatcher(vocabulary.engine, compiled)
        self._ordinary = np.full(num_words(self.size + 1), 0xFFFFFFFF, np.uint32)  # all but the end
        self._ordinary[self.size // 32] = (1 << self.size % 32) - 1
        self._words = np.zeros((1, len(self._ordinary)), np.int32)

    def reset(self) -> None:
        """Goes back to the empty text."""
        self._matcher.reset()

    def fill(self, words: np.ndarray) -> bool:
        """Writes the tokens that may come next to u32[W]; returns whether the text may end here."""
        import llguidance.numpy

        ends = self._matcher.is_accepting()  # the mask would say that a dead end is one, too
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._words, 0)
        found = self._words[0].view(np.uint32)
        np.bitwise_and(found[: len(words)], self._ordinary[: len(words)], out=words)
        return ends

    def consume(self, token: int) -> bool:
        """Adds a token; returns False, with the text as it was, where the grammar does not allow it."""
        return self._matcher.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        """Takes the last `count` tokens away again."""
        if count:
            self._matcher.rollback(count)
