"""Grammars: regular expressions, context-free grammars in Lark's syntax, and JSON Schemas, for one vocabulary.

vocabulary = Vocabulary.of(tokenizer, model.config.vocab_size)
date = regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", vocabulary)
decode_fn = make_decode_fn(model, "constrained", stop_tokens=tokenizer.stop_ids)
decode_fn(params, prompts, grammars=date)
"""

import itertools
import json
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from decoding.grammar.automaton import TokenTable, token_table
from decoding.grammar.bitmask import num_words
from decoding.grammar.matcher import EngineMatcher, GrammarMatcher
from decoding.grammar.vocabulary import Vocabulary
from models.errors import InputError

_COUNT = itertools.count()
_WHOLE_MASKS = (
    '\n%llguidance {"no_forcing": true}\n'  # also where the next bytes are certain: any tokens that spell them
)
BY_NUMBER: "weakref.WeakValueDictionary[int, Grammar]" = weakref.WeakValueDictionary()


class Cursor:
    """A matcher that goes to whatever text it is told, from where it stands."""

    def __init__(self, matcher: GrammarMatcher):
        """Stands at the empty text."""
        self._matcher, self._text = matcher, []

    def move(self, text: np.ndarray) -> GrammarMatcher:
        """Returns the matcher behind a text i32[T] of the grammar: back to where the two part, then forward."""
        shared = min(len(text), len(self._text))
        differ = np.flatnonzero(np.asarray(self._text[:shared], np.int64) != text[:shared])
        shared = int(differ[0]) if len(differ) else shared
        self._matcher.rollback(len(self._text) - shared)
        del self._text[shared:]
        for token in text[shared:].tolist():
            self._matcher.consume(token)
            self._text.append(token)
        return self._matcher


@dataclass(frozen=True, eq=False)
class Grammar:
    """A grammar, checked and compiled; made by `regex`, `lark` and `json_schema`.

    Attributes:
        kind: in which language it is written.
        source: its text.
        vocabulary: the tokens that it is for.
        compiled: its form in the parsing engine.
        table: what each token does in each state, for grammars with few states: with it, decoding stays on the device.
            None: the parsing engine is asked at each step, on the host.
        number: tells it from all other grammars of this process.
    """

    kind: Literal["regex", "lark", "json_schema"]
    source: str
    vocabulary: Vocabulary = field(repr=False)
    compiled: str = field(repr=False)
    table: TokenTable | None = field(default=None, repr=False)
    number: int = field(default_factory=lambda: next(_COUNT))
    _cursors: dict[int, "Cursor"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        BY_NUMBER[self.number] = self

    def matcher(self) -> GrammarMatcher:
        """Returns a matcher of its own that stands at the empty text."""
        return EngineMatcher(self.vocabulary, self.compiled)

    def cursor(self, row: int) -> "Cursor":
        """Returns the matcher that a batch's row used last, wherever it stands."""
        if row not in self._cursors:
            self._cursors[row] = Cursor(self.matcher())
        return self._cursors[row]

    def accepts(self, tokens: Any) -> bool:
        """Returns whether a text, as token ids without the stop token, is one of the grammar's."""
        matcher = self.matcher()
        consumed = all(matcher.consume(int(token)) for token in tokens)
        return consumed and matcher.fill(np.zeros(num_words(self.vocabulary.size), np.uint32))


def regex(pattern: str, vocabulary: Vocabulary) -> Grammar:
    r"""Returns the grammar of the texts that a regular expression matches from beginning to end.

    Args:
        pattern: in the syntax of Rust's regex library: no look-around, no back-references, no anchors. Classes such as
            `\d` mean Unicode's.
        vocabulary: the tokens.

    Raises:
        InputError: an error in the expression, with its column, or an expression that admits no token.
    """
    import llguidance

    _check_text("pattern", pattern)
    plain = llguidance.LLMatcher.grammar_from_regex(pattern)
    rule = json.loads(plain)["grammars"][0]["lark_grammar"]
    compiled = _checked(plain, rule, vocabulary, f"the regular expression {pattern!r:.80}")
    return Grammar("regex", pattern, vocabulary, compiled, token_table(pattern, vocabulary))


def lark(text: str, vocabulary: Vocabulary) -> Grammar:
    """Returns a context-free grammar.

    Args:
        text: in Lark's syntax as llguidance reads it: the start rule is `start`, terminals are in capitals.
        vocabulary: the tokens.

    Raises:
        InputError: an error in the grammar, with line and column, or one that admits no token.
    """
    import llguidance

    _check_text("text", text)
    compiled = _checked(llguidance.LLMatcher.grammar_from_lark(text), text, vocabulary, "the grammar")
    return Grammar("lark", text, vocabulary, compiled)


def json_schema(schema: Mapping[str, Any] | str, vocabulary: Vocabulary) -> Grammar:
    """Returns the grammar of the JSON texts that a schema allows.

    Args:
        schema: as an object or as JSON text.
        vocabulary: the tokens.

    Raises:
        InputError: no JSON (with line and column), a feature that llguidance does not support (named), or a schema that
            nothing fits.
    """
    import llguidance

    try:
        source = schema if isinstance(schema, str) else json.dumps(schema)
        json.loads(source)
    except (TypeError, ValueError) as error:
        raise InputError(f"the schema is not JSON: {error}") from error
    plain = llguidance.LLMatcher.grammar_from_json_schema(source)
    compiled = _checked(plain, f"start: %json {source}", vocabulary, "the JSON Schema")
    return Grammar("json_schema", source, vocabulary, compiled)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name} must be text, got {text!r:.80}")


def _checked(plain: str, text: str, vocabulary: Vocabulary, what: str) -> str:
    """Returns a grammar as the engine is to read it, from its `plain` form and from its text in Lark's syntax.

    Raises InputError with what the engine has against it, or where its first mask is empty.
    """
    import llguidance

    compiled = llguidance.LLMatcher.grammar_from_lark(text + _WHOLE_MASKS)
    for form in (plain, compiled):
        message = llguidance.LLMatcher.validate_grammar(form, vocabulary.engine)
        if message:
            raise InputError(_told(message, what))
    words = np.zeros(num_words(vocabulary.size), np.uint32)
    if not EngineMatcher(vocabulary, compiled).fill(words) and not words.any():
        raise InputError(f"{what} admits no token at all: no text of it can begin with a token of this vocabulary")
    return compiled


def _told(message: str, what: str) -> str:
    """Returns the engine's message with the place in words, and with what can be done."""
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ", message)
    unsupported = re.match(r"Unimplemented keys: \[(.*)\]", message)
    if unsupported:
        return f"{what} uses {unsupported[1]}, which the engine does not support: leave it out, or write a grammar"
    if message.startswith("Unsatisfiable"):
        return f"{what} admits no token at all: {message}"
    if place and not what.startswith("the regular"):
        return f"{what} has an error in line {place[1]}, column {place[2]}: {message[place.end() :].strip()}"
    inner = re.search(r"regex parse error:\n    (.*)\n    ( *)(\^+)\nerror: (.*)", message)
    if inner:
        return f"{what} has an error in column {len(inner[2]) + 1} ({inner[1]}): {inner[4]}"
    return f"{what} cannot be used: {message.strip()}"
