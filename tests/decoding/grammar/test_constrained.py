"""Constrained decoding: what it writes is in the grammar, by parsers that know nothing of it."""

import json
import re

import jax
import jsonschema
import lark as oracle
import numpy as np
import pytest

import decoding.decode
from decoding import make_decode_fn
from decoding.grammar import Vocabulary, json_schema, lark, regex
from decoding.stream import stream
from models.errors import InputError
from models.weights.byte_tokenizer import byte_tokenizer
from tests.support.decode_reference import PROMPTS, filtered, forward, greedy_texts, row_seeds, texts
from tests.support.grammars import STOP, random_pattern, small_vocabulary, text_of

ROOM = 40
VOCABULARY = small_vocabulary()
SUM = """start: expr
expr: term (("+"|"-") term)?
term: NUM | "(" expr ")"
NUM: /[0-9]{1,2}/"""
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": [1, 10, True]},
        "b": {"type": "array", "items": {"enum": ["ab", "cc"]}, "maxItems": 2},
    },
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def decode_fn(tiny):
    return make_decode_fn(tiny[0], "constrained", max_new_tokens=ROOM, stop_tokens=[STOP])


def finished(output) -> list[bytes]:
    """Returns the texts of rows that ended with a stop token; the others are too long to say."""
    return [text_of(row) for row in texts(output) if row and row[-1] == STOP]


def test_random_expressions_are_matched_row_by_row_without_a_retrace(decode_fn, tiny):
    """Eight grammars in a batch, ten batches, one compiled function."""
    compiled, done, seen = decoding.decode._decode._cache_size(), 0, set()
    for batch in range(10):
        patterns = [random_pattern(100 + 8 * batch + row) for row in range(len(PROMPTS))]
        grammars = [regex(pattern, VOCABULARY) for pattern in patterns]
        output = decode_fn(tiny[1], PROMPTS, row_seeds(), grammars=grammars, temperature=1.5)
        for pattern, row in zip(patterns, texts(output), strict=True):
            if row[-1] == STOP:
                done += 1
                assert re.fullmatch(pattern, text_of(row).decode()), (pattern, text_of(row))
        constraint = decode_fn.inputs(PROMPTS, grammars=grammars)[1].grammar
        seen.add(tuple(leaf.shape for leaf in jax.tree.leaves(constraint)))
    assert decoding.decode._decode._cache_size() <= compiled + len(seen) and len(seen) < 5
    assert done > 70, "too few rows ended for the check to mean much"


def test_ten_grammars_of_one_size_compile_once(decode_fn, tiny):
    """Other states, other texts, one bucket: nothing is traced anew."""
    compiled, found = None, set()
    for number in range(10):
        grammar = regex(f"(?:ab){{{number + 1}}}[0-9]{{3}}", VOCABULARY)
        output = decode_fn(tiny[1], PROMPTS, grammars=grammar)
        found |= {text_of(row) for row in texts(output)[:1]}
        assert compiled in (None, decoding.decode._decode._cache_size())
        compiled = decoding.decode._decode._cache_size()
    assert len(found) == 10


def test_sums_are_parsed_by_lark(decode_fn, tiny):
    parser = oracle.Lark(SUM.replace("start:", "?start:"))
    output = decode_fn(tiny[1], PROMPTS, 3, grammars=lark(SUM, VOCABULARY), temperature=2.0)
    found = finished(output)
    assert len(set(found)) > 3
    for text in found:
        parser.parse(text.decode())
    with pytest.raises(oracle.exceptions.UnexpectedInput):
        parser.parse("1+")


def test_objects_are_valid_by_jsonschema(decode_fn, tiny):
    output = decode_fn(tiny[1], PROMPTS, 3, grammars=json_schema(SCHEMA, VOCABULARY), temperature=2.0)
    found = finished(output)
    assert len(found) > 3
    for text in found:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_host_and_table_write_the_same_and_rows_may_mix_them(decode_fn, tiny):
    pattern = r"[abc]{3,6}(?:x|é)"
    free, table = None, regex(pattern, VOCABULARY)
    host = lark(f"start: /{pattern}/", VOCABULARY)
    assert table.table is not None and host.table is None
    rows = {"table": [table, free] * 4, "host": [host, free] * 4, "mixed": [host, free, table, free] * 2}
    found = [texts(decode_fn(tiny[1], PROMPTS, row_seeds(), grammars=row, temperature=0.9)) for row in rows.values()]
    assert found[0] == found[1] == found[2]
    plain = make_decode_fn(tiny[0], "sample", max_new_tokens=ROOM, stop_tokens=[STOP])
    unconstrained = texts(plain(tiny[1], PROMPTS, row_seeds(), temperature=0.9))
    assert found[0][1::2] == unconstrained[1::2] and found[0][0::2] != unconstrained[0::2]


def test_greedy_takes_the_likeliest_allowed_token(decode_fn, tiny):
    grammar = regex("[a-e0-9]{5}", VOCABULARY)
    prompt = PROMPTS[1]
    text = texts(decode_fn(tiny[1], [prompt], grammars=grammar))[0]
    row, state = list(prompt), 0
    for token in text:
        allowed = grammar.table.allowed()[state].copy()
        allowed[STOP] = grammar.table.accepting[state]
        padded = np.array([row + [0] * (64 - len(row))], np.int32)
        logits = np.where(allowed, np.asarray(forward(*tiny, padded))[0, len(row) - 1], -np.inf)
        assert token == int(np.argmax(logits)) and not filtered(logits, set(), temperature=0.0)[1]
        row.append(token)
        state = grammar.table.next[state, grammar.table.classes[token]]
    assert re.fullmatch(b"[a-e0-9]{5}", text_of(text)) and text[-1] == STOP


def test_without_grammars_it_is_greedy(decode_fn, tiny):
    expected = [row[: row.index(STOP) + 1] if STOP in row else row for row in greedy_texts(*tiny, PROMPTS, 24)]
    assert texts(decode_fn(tiny[1], PROMPTS, max_new_tokens=24)) == expected


def test_a_stream_asks_the_engine_too(tiny):
    tokenizer = byte_tokenizer()
    vocabulary = Vocabulary([*token_texts(), *[None] * 31])
    fn = make_decode_fn(tiny[0], "constrained", max_new_tokens=12, stop_tokens=[60])
    pieces = list(stream(fn, tiny[1], tokenizer, [1, 2], grammars=lark('start: "!" /["#]+/ "$"', vocabulary)))
    assert pieces and len("".join(pieces)) > 1


def token_texts() -> list[bytes]:
    """The first thirty tokens of the tokenizer of bytes: printable characters from `!` on."""
    return [bytes([33 + index]) for index in range(30)]


def test_a_dead_end_ends_the_row(decode_fn, tiny):
    """The engine does not see that no token writes Q."""
    output = decode_fn(tiny[1], [PROMPTS[0]], grammars=lark('start: "a" "b" "Q"', VOCABULARY))
    text = texts(output)[0]
    assert text_of(text) == b"ab" and text[-1] == STOP


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"grammars": "a+"}, "grammars must be one Grammar"),
        ({"grammars": [None]}, "one for each of 8 prompts"),
        ({"grammars": regex("a", Vocabulary([b"a", None]))}, "made for 2 tokens, the model has 61"),
    ],
)
def test_calls_that_cannot_be(decode_fn, tiny, call, told):
    with pytest.raises(InputError, match=told):
        decode_fn(tiny[1], PROMPTS, **call)


def test_methods_and_functions_that_take_no_grammars(tiny):
    grammar = regex("a", VOCABULARY)
    with pytest.raises(InputError, match="takes no grammars: use .*constrained"):
        make_decode_fn(tiny[0], "greedy", stop_tokens=[STOP])(tiny[1], PROMPTS, grammars=grammar)
    with pytest.raises(InputError, match="pass stop_tokens"):
        make_decode_fn(tiny[0], "constrained")(tiny[1], PROMPTS, grammars=grammar)
