"""A model's tokens as grammars see them: bytes, and the parsing engine's own form of them."""

import functools
from collections.abc import Sequence
from typing import Any

from models.errors import InputError
from models.weights.token_bytes import token_bytes
from models.weights.tokenizer import Tokenizer, check_vocabulary


class Vocabulary:
    """The tokens of one model; make it once, and every grammar of that model with it.

    Attributes:
        tokens: the bytes of each id, as many as the model's logits are wide; None where an id stands for no text
            (special tokens, stop tokens, padding), so that no grammar ever allows it.
    """

    def __init__(self, tokens: Sequence[bytes | None]):
        """Keeps the bytes; `Vocabulary.of` reads them from a tokenizer. An empty token is taken as one without text."""
        self.tokens: tuple[bytes | None, ...] = tuple(token or None for token in tokens)
        if not any(self.tokens):
            raise InputError("the vocabulary has no token that stands for text: take a model with a tokenizer")

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> "Vocabulary":
        """Returns the vocabulary of a model whose logits are `vocab_size` wide.

        Raises:
            InputError: the tokenizer has more ids than that, or its tokens' bytes are not known.
        """
        check_vocabulary(tokenizer, vocab_size)
        tokens = token_bytes(tokenizer)
        return cls([*tokens, *[None] * (vocab_size - len(tokens))])

    @property
    def size(self) -> int:
        """V, the width of the logits."""
        return len(self.tokens)

    @functools.cached_property
    def engine(self) -> Any:
        """The `llguidance.LLTokenizer` of these tokens and, behind them, one that stands for the end of a text."""
        import llguidance

        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(self.tokens)))


class _Tokens:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokens: Sequence[bytes | None]):
        """Names the ids without text, so that no text can be taken for them."""
        self.tokens = [token or b"<|%d|>" % index for index, token in enumerate([*tokens, None])]
        self.special_token_ids = [index for index, token in enumerate([*tokens, None]) if token is None]
        self.eos_token_id, self.bos_token_id = len(tokens), None

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns no ids: texts are never cut into tokens here."""
        return []
