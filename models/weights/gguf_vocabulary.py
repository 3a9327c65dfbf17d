"""The tokenizer in a GGUF file, rebuilt.

A GGUF file stores a vocabulary, and only the name of the rest. `GgufVocabulary` checks the fields and rebuilds the
rest, for two kinds of vocabulary:

- `gpt2`: byte-level BPE. How text is cut before merging comes from `PRE_TOKENIZERS`, by `tokenizer.ggml.pre`.
- `llama`: SentencePiece BPE with byte fallback. The file has scores, not merges: `merges_from_scores` recovers them.

Notes:
    Ids at the end of a vocabulary that only pad the embedding table are dropped, as in the published tokenizers.
    With `add_space_prefix` a space is put before every text, even one that already starts with a space, and before
    the text after a special token, as in the published files of Llama 2.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from models.errors import InputError, unknown_name

_SPACE = "▁"  # how SentencePiece writes a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # the values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Splitting:
    """How a byte-level vocabulary cuts text before merging."""

    pattern: str | None = None  # regular expression of the pieces; None is GPT-2's
    single_digits: bool = False  # every digit is a piece of its own
    nfc: bool = False  # Unicode is composed first (normal form C)
    whole_words: bool = False  # a piece that is in the vocabulary is one id, whatever the merges say
    add_bos: bool = False  # BOS comes first unless the file says otherwise


def _word_pattern(digits: str) -> str:
    """Returns the splitting expression of the Llama 3 line of models, which differ in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA_3 = Splitting(pattern=_word_pattern(r"\p{N}{1,3}"), whole_words=True, add_bos=True)

# tokenizer.ggml.pre -> how text is cut.
PRE_TOKENIZERS: dict[str, Splitting] = {
    "default": Splitting(),
    "gpt-2": Splitting(),
    "llama-bpe": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama3": _LLAMA_3,
    "qwen2": Splitting(pattern=_word_pattern(r"\p{N}"), nfc=True),
    "smollm": Splitting(single_digits=True),
}


class GgufVocabulary:
    """The tokenizer fields of a GGUF file, checked, and the steps that turn them into a tokenizer."""

    def __init__(self, fields: Mapping[str, Any]):
        """Reads the lists of tokens, types and scores; raises InputError where they do not fit together."""
        self.fields = fields
        self.tokens: list[str] = list(self._required("tokens"))
        self.types: list[int] = self._per_token("token_type", filler=_NORMAL)
        self.scores: list[float] = self._per_token("scores", filler=0.0)
        while self.types and self.types[-1] == _UNUSED:  # rows that pad the embedding table
            for column in (self.tokens, self.types, self.scores):
                column.pop()

    def build(self) -> tokenizers.Tokenizer:
        """Returns the whole tokenizer, which puts BOS and EOS around a text where the file wants them."""
        kinds = {"gpt2": self._byte_level, "llama": self._sentencepiece}
        kind = self._required("model")
        if kind not in kinds:
            raise unknown_name("kind of vocabulary (tokenizer.ggml.model)", kind, kinds)
        try:
            backend, add_bos = kinds[kind]()
        except InputError:
            raise
        except Exception as error:  # The library raises plain Exception for merges that do not fit the vocabulary.
            raise InputError(f"the file's tokenizer is inconsistent: {error}; download the file again.") from error
        self._add_tokens(backend)
        self._add_template(backend, add_bos)
        return backend

    def special_id(self, name: str) -> int | None:
        """Returns the id of the special token `name` (bos, eos, padding, ...), or None where the file names none."""
        token_id = self._get(f"{name}_token_id")
        if token_id is not None and not 0 <= token_id < len(self.tokens):
            raise InputError(
                f"the file's tokenizer.ggml.{name}_token_id is {token_id}, but its ids end at {len(self.tokens) - 1}; "
                "download the file again."
            )
        return token_id

    def _get(self, name: str) -> Any:
        return self.fields.get(f"tokenizer.ggml.{name}")

    def _required(self, name: str) -> Any:
        value = self._get(name)
        if not value:
            raise InputError(f"the file has no tokenizer.ggml.{name}; take a GGUF file that includes its tokenizer.")
        return value

    def _per_token(self, name: str, filler: Any) -> list[Any]:
        values = list(self._get(name) or [filler] * len(self.tokens))
        if len(values) != len(self.tokens):
            raise InputError(
                f"the file's tokenizer.ggml.{name} has {len(values)} items for {len(self.tokens)} tokens; "
                "download the file again."
            )
        return values

    def _byte_level(self) -> tuple[tokenizers.Tokenizer, bool]:
        """Returns the tokenizer of a `gpt2` vocabulary, and whether its line of models starts with BOS."""
        name = self._get("pre") or "default"
        if name not in PRE_TOKENIZERS:
            raise unknown_name("pre-tokenizer (tokenizer.ggml.pre)", name, PRE_TOKENIZERS)
        splitting = PRE_TOKENIZERS[name]
        vocab = {token: index for index, token in enumerate(self.tokens)}
        merges = [tuple(merge.split(" ")) for merge in self._required("merges")]
        backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=splitting.whole_words))
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)]
        if splitting.pattern is not None:
            steps.insert(0, pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
        if splitting.single_digits:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        backend.decoder = decoders.ByteLevel()
        if splitting.nfc:
            backend.normalizer = normalizers.NFC()
        return backend, splitting.add_bos

    def _sentencepiece(self) -> tuple[tokenizers.Tokenizer, bool]:
        """Returns the tokenizer of a `llama` vocabulary, and whether its line of models starts with BOS."""
        self._required("scores")
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == _USER_DEFINED:  # stored with plain spaces, and with a score that is only a filler
                self.tokens[index] = token if token.strip(" ") else _SPACE * len(token)
                self.scores[index] = 0.0
        unknown = self.special_id("unknown")
        backend = tokenizers.Tokenizer(
            BPE(
                vocab={token: index for index, token in enumerate(self.tokens)},
                merges=merges_from_scores(self.tokens, self.scores, self.types),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        steps = [normalizers.Replace(" ", _SPACE)]
        back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._get("add_space_prefix") is not False:
            steps.insert(0, normalizers.Prepend(_SPACE))
            back.append(decoders.Strip(content=" ", left=1))
        backend.normalizer = normalizers.Sequence(steps)
        backend.decoder = decoders.Sequence(back)
        return backend, True

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        """Makes control tokens special, and user-defined ones whole."""
        always = {self.special_id("bos"), self.special_id("eos")}
        special, whole = [], []
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (_UNKNOWN, _CONTROL) or index in always:
                special.append(AddedToken(token, special=True, normalized=False))
            elif kind == _USER_DEFINED:
                whole.append(AddedToken(token, special=False, normalized=False))
        backend.add_special_tokens(special)
        backend.add_tokens(whole)

    def _add_template(self, backend: tokenizers.Tokenizer, add_bos: bool) -> None:
        """Puts BOS before and EOS after every text, where the file or its line of models wants them."""
        wanted = self._get("add_bos_token")
        bos = self.special_id("bos") if (add_bos if wanted is None else wanted) else None
        eos = self.special_id("eos") if self._get("add_eos_token") else None
        before, after = ([] if i is None else [(self.tokens[i], i)] for i in (bos, eos))
        if before or after:
            single = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
            backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*before, *after])


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the merges, best first, of a vocabulary that has scores instead.

    Every cut of a piece into two other pieces is a merge, and it ranks by the piece's score. Merges of pieces with
    equal scores rank by the length of their left part, longest first, then of their right part.

    Args:
        tokens: the pieces, by id.
        scores: of each piece; SentencePiece merges the highest first.
        types: of each piece; only normal and user-defined pieces are made by merging.
    """
    known = set(tokens)
    merged = (i for i, kind in enumerate(types) if kind in (_NORMAL, _USER_DEFINED) and len(tokens[i]) > 1)
    merges = []
    for _, equals in itertools.groupby(sorted(merged, key=lambda i: -scores[i]), key=scores.__getitem__):
        cuts = [
            (piece[:at], piece[at:])
            for piece in map(tokens.__getitem__, equals)
            for at in range(len(piece) - 1, 0, -1)
            if piece[:at] in known and piece[at:] in known
        ]
        merges += sorted(cuts, key=lambda cut: (-len(cut[0]), -len(cut[1])))
    return merges
