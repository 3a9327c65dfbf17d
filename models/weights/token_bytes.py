"""The bytes that each token of a tokenizer stands for, which text-level constraints are built from."""

import json
import re

from models.errors import InputError
from models.weights.tokenizer import Tokenizer

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Returns the bytes of every id from 0 to `tokenizer.vocab_size` - 1; None where an id stands for no text.

    No text have special tokens, stop tokens, and ids without a token. A token may be a part of a character: in a
    byte-level vocabulary any token, in a SentencePiece one those of byte fallback.

    Raises:
        InputError: the vocabulary is of neither of these two kinds.
    """
    backend = tokenizer.backend
    kinds = set(re.findall(r'"type": ?"(\w+)"', json.dumps(json.loads(backend.to_str())["decoder"])))
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise InputError(
            f"the bytes of this tokenizer's tokens are not known (its decoder: {', '.join(sorted(kinds)) or 'none'}); "
            "take a byte-level or a SentencePiece vocabulary"
        )
    alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
    added = backend.get_added_tokens_decoder()
    found: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            text = None if added[index].special else added[index].content.encode()
        elif alphabet is not None:
            text = bytes(alphabet[char] for char in token) if all(char in alphabet for char in token) else None
        else:
            byte = _BYTE.fullmatch(token)
            text = bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
        found[index] = text or None
    for index in tokenizer.stop_ids:
        found[index] = None
    return found


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte behind each character of a byte-level vocabulary: printable bytes are written as themselves,
    the others in order from U+0100 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
