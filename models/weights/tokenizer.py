"""Tokenizers: text to ids and back, as the model's own tokenizer does it.

A `Tokenizer` wraps the Rust `tokenizers` library and is built from the two forms in which models are published: the
fields of a GGUF file (`from_gguf`, see `gguf_vocabulary`) and a Hugging Face folder (`from_folder`).
Ids are those of the Hugging Face tokenizer that was published with the model.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from models.errors import InputError
from models.weights.chat import render_chat
from models.weights.gguf_vocabulary import GgufVocabulary
from models.weights.whole import whole_file

# Added tokens that end a turn or a text, in whatever model has them.
TURN_ENDS = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<eos>"}
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back, the special ids, and the chat template.

    Build one with `from_gguf` or `from_folder`.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]  # ids that end a generation: EOS and the ends of a turn, ascending
    chat_template: str | None = field(repr=False)  # Jinja source

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids: one more than the greatest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Returns the ids of a text; special tokens written in the text become their ids.

        Args:
            text: any valid Unicode.
            add_special: whether to put BOS before and EOS after it, where the model wants them.

        Raises:
            InputError: not a string, or a string with half a surrogate pair.
        """
        if not isinstance(text, str):
            raise InputError(f"encode takes one string, got {type(text).__name__}; encode a list item by item.")
        try:
            return self.backend.encode(text, add_special_tokens=add_special).ids
        except TypeError as error:  # what the library says to a string that UTF-8 cannot hold
            raise InputError(
                "the text is not valid Unicode (it holds half of a surrogate pair); read it with errors='replace'."
            ) from error

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """Returns the text of ids, with no clean-up of spaces; ids past the vocabulary give no text.

        Args:
            ids: one sequence, [T], of ids from 0 up (a list or an array of numpy or JAX).
            skip_special: whether special tokens are left out of the text.

        Raises:
            InputError: not one sequence of integers from 0 up.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0)):
            raise InputError(
                f"decode takes one sequence of ids from 0 up, got shape {ids.shape} and type {ids.dtype}: {ids!r:.80}; "
                "decode row by row, and cut padding off first."
            )
        return self.backend.decode(ids.tolist(), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Mapping[str, str]] | str, *, add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation by the model's chat template.

        Args:
            messages: the turns in order, each with a `role` and a `content`; a string is one user turn.
            add_generation_prompt: whether to end with the header of an assistant turn, ready to be continued.

        Raises:
            InputError: the model has no chat template, or the template fails or refuses the messages.
        """
        if self.chat_template is None:
            raise InputError(
                "this tokenizer has no chat template (a base model has none); "
                "pass plain text to encode instead, or take an instruct model."
            )
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        special_tokens = {name: self.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        return render_chat(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, special_tokens=special_tokens
        )

    def encode_chat(self, messages: Sequence[Mapping[str, str]] | str) -> list[int]:
        """Returns the ids of a conversation, ready for the assistant's answer.

        The template writes every special token itself, so none is added (no second BOS). Raises what `chat` raises.
        """
        return self.encode(self.chat(messages), add_special=False)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `from_folder` and Hugging Face's loaders read.

        Args:
            folder: where to write; made if it does not exist. Files of those two names are replaced.

        Raises:
            InputError: the path is not a folder.
        """
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "stop_token_ids": list(self.stop_ids),
        }
        for name, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            config[name] = None if i is None else self.backend.id_to_token(i)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        files = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        }
        try:
            for name, text in files.items():
                with whole_file(Path(folder) / name) as partial:
                    partial.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot save a tokenizer in {str(folder)!r}: {error}; name a folder.") from error

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """Builds the tokenizer that a GGUF file describes.

        Args:
            fields: the file's metadata as plain Python values; of these, the `tokenizer.*` keys are read.

        Raises:
            InputError: a field is missing or does not fit the others, or the kind of vocabulary is not known.
        """
        vocabulary = GgufVocabulary(fields)
        backend = vocabulary.build()
        eos = vocabulary.special_id("eos")
        ends = (eos, vocabulary.special_id("eot"), vocabulary.special_id("eom"))
        return cls(
            backend=backend,
            bos_id=vocabulary.special_id("bos"),
            eos_id=eos,
            pad_id=vocabulary.special_id("padding"),
            stop_ids=_stop_ids(backend, ends),
            chat_template=fields.get("tokenizer.chat_template"),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face model folder.

        Needs tokenizer.json; special tokens and the chat template come from tokenizer_config.json,
        special_tokens_map.json, generation_config.json (every EOS id) and chat_template.jinja, where they exist.

        Raises:
            InputError: no tokenizer.json, or a file that cannot be read.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                f"no tokenizer.json in {str(folder)!r}; name a model folder that has one "
                "(a folder with tokenizer.model only must be converted first)."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises plain Exception for every kind of broken file.
            raise InputError(f"{str(path)!r} is not a readable tokenizer: {error}; download it again.") from error
        backend.no_truncation()  # both are habits of one training run, stored with the vocabulary
        backend.no_padding()
        config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        ends = _read_json(folder / "generation_config.json").get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        eos = _named_id(backend, config, "eos_token")
        eos = ends[0] if eos is None and ends else eos
        return cls(
            backend=backend,
            bos_id=_named_id(backend, config, "bos_token"),
            eos_id=eos,
            pad_id=_named_id(backend, config, "pad_token"),
            stop_ids=_stop_ids(backend, (eos, *ends, *config.get("stop_token_ids", ()))),
            chat_template=_folder_template(folder, config),
        )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that every id of a tokenizer has a row in a model's embedding table.

    Args:
        tokenizer: the tokenizer to be used with the model.
        vocab_size: rows of the embedding table; more rows than ids are padding and fine.

    Raises:
        InputError: the tokenizer has more ids than the model has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"mismatched tokenizer: it has {tokenizer.vocab_size} ids, but the model has rows for {vocab_size}; "
            "use the tokenizer that was published with the model."
        )


def _stop_ids(backend: tokenizers.Tokenizer, ends: Sequence[int | None]) -> tuple[int, ...]:
    """Returns the given ids and those of the added tokens that end a turn, ascending, each once."""
    turns = {i for i, token in backend.get_added_tokens_decoder().items() if token.content in TURN_ENDS}
    return tuple(sorted(turns.union(end for end in ends if end is not None)))


def _named_id(backend: tokenizers.Tokenizer, config: Mapping[str, Any], name: str) -> int | None:
    """Returns the id of the special token that a tokenizer_config.json names, or None where it names none."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, Mapping) else token
    return None if token is None else backend.token_to_id(token)


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Returns the chat template of a model folder: its own file's, else the configuration's (the default one)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {row["name"]: row["template"] for row in template}.get("default")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not valid JSON: {error}; download it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} holds a JSON {type(value).__name__}, not an object; download it again.")
    return value
