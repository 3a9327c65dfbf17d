"""Masks of tables and of the engine, against matchers that try every text; and grammars that cannot be."""

import jax.numpy as jnp
import numpy as np
import pytest

from decoding.grammar import Vocabulary, json_schema, lark, regex
from decoding.grammar.automaton import byte_automaton
from decoding.grammar.bitmask import mask_logits, num_words, pack, unpack
from decoding.grammar.grammar import Cursor
from models.errors import InputError
from models.weights.byte_tokenizer import byte_tokenizer
from models.weights.token_bytes import token_bytes
from models.weights.tokenizer import Tokenizer
from tests.support.grammars import brute_mask, random_pattern, small_vocabulary, text_of, words_up_to

VOCABULARY = small_vocabulary()
FINITE = {  # expressions of few texts: all of them are tried
    "a|ab": ("ab", 2),
    "(?:ab|ba|c)?x": ("abcx", 3),
    "a{1,4}b?": ("ab", 5),
    "(?:a|b|ab){2}": ("ab", 4),
    "[é€ж]x?€": ("é€жx", 3),
    "(?:a*?b?){1}(?:c|cc)": None,
}


def engine_mask(matcher) -> tuple[np.ndarray, bool]:
    words = np.zeros(num_words(VOCABULARY.size), np.uint32)
    ends = matcher.fill(words)
    return np.asarray(unpack(jnp.asarray(words[None]), VOCABULARY.size))[0], ends


def walks(grammar, seed: int, count: int = 12, longest: int = 8):
    """Yields (tokens, their state, a matcher that stands behind them) along random texts of a grammar."""
    rng, cursor = np.random.default_rng(seed), Cursor(grammar.matcher())
    allowed = grammar.table.allowed()
    for _ in range(count):
        text, state = [], 0
        for _ in range(longest):
            yield text, state, cursor.move(np.array(text, np.int32))
            if not allowed[state].any():
                break
            text = [*text, int(rng.choice(np.flatnonzero(allowed[state])))]
            state = int(grammar.table.next[state, grammar.table.classes[text[-1]]])


@pytest.mark.parametrize("pattern", [pattern for pattern, tried in FINITE.items() if tried])
def test_masks_equal_those_of_a_matcher_that_tries_every_text(pattern):
    words, grammar = words_up_to(pattern, *FINITE[pattern]), regex(pattern, VOCABULARY)
    for text, state, matcher in walks(grammar, 1):
        expected, ends = brute_mask(words, text_of(text))
        np.testing.assert_array_equal(grammar.table.allowed()[state], expected, err_msg=f"table behind {text}")
        assert grammar.table.accepting[state] == ends
        found, engine_ends = engine_mask(matcher)
        np.testing.assert_array_equal(found, expected, err_msg=f"engine behind {text}")
        assert engine_ends == ends


@pytest.mark.parametrize("seed", range(12))
def test_tables_and_engine_agree_on_random_expressions(seed):
    grammar, checked = regex(random_pattern(seed), VOCABULARY), 0
    for text, state, matcher in walks(grammar, seed, count=4):
        found, ends = engine_mask(matcher)
        table = grammar.table.allowed()[state]
        assert not (table & ~found).any() and grammar.table.accepting[state] == ends, f"behind {text}"
        lost = np.flatnonzero(found & ~table)  # the engine allows parts of characters that no token completes
        assert all(VOCABULARY.tokens[token][-1] >= 0x80 for token in lost)
        checked += 1
    assert checked >= 4


def test_automata_are_minimal_and_take_the_longer_alternative():
    steps, accepting = byte_automaton("a|ab")
    assert steps.shape == (3, 256) and accepting.tolist() == [False, True, True]
    steps, accepting = byte_automaton("(?:a|b)(?:a|b)|(?:aa|ab|ba|bb)")
    assert len(steps) == 3 and accepting.tolist() == [False, False, True]


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 61, 96])
def test_bits_unpack_to_what_was_packed(vocab):
    allowed = np.random.default_rng(vocab).random((3, vocab)) < 0.5
    words = pack(allowed)
    assert words.shape == (3, num_words(vocab)) and words.dtype == np.uint32
    np.testing.assert_array_equal(unpack(jnp.asarray(words), vocab), allowed)


def test_stop_tokens_are_allowed_at_ends_and_where_nothing_else_is():
    words = jnp.asarray(pack(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], bool)))
    masked = mask_logits(jnp.zeros((4, 4)), words, jnp.array([False, True, False, False]), (1, 3))
    expected = [[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]]
    np.testing.assert_array_equal(masked == 0, np.array(expected, bool))


def test_a_cursor_goes_back_and_forth():
    grammar = regex("(?:ab|ba)*", VOCABULARY)
    tokens = VOCABULARY.tokens
    a, b = tokens.index(b"a"), tokens.index(b"b")
    cursor = Cursor(grammar.matcher())
    for text in ([], [a], [a, b, b], [a, b, b, a], [b], [b, a, a, b], []):
        fresh = grammar.matcher()
        assert all(fresh.consume(token) for token in text)
        found, expected = engine_mask(cursor.move(np.array(text, np.int32))), engine_mask(fresh)
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1] == expected[1]


def test_a_token_that_is_not_allowed_leaves_the_text():
    matcher = regex("ab", VOCABULARY).matcher()
    assert not matcher.consume(VOCABULARY.tokens.index(b"b"))
    assert matcher.consume(VOCABULARY.tokens.index(b"ab")) and engine_mask(matcher)[1]


@pytest.mark.parametrize(
    ("make", "source", "told"),
    [
        (lark, 'start: "a" (b | "c"\nb: "x"', "line 1, column 20"),
        (lark, 'start: "a"\n%%%', "line 2, column 2"),
        (lark, "start: foo", 'line 1, column 8: unknown name: "foo"'),
        (lark, 'start: "Q"', "admits no token at all"),
        (regex, "[a", r"column 1 .*unclosed character class"),
        (regex, "ab(?=a)b", r"column 3 .*look-around"),
        (regex, r"[^\s\S]", "admits no token at all"),
        (regex, "aQ", "admits no token at all"),
        (json_schema, {"type": "array", "uniqueItems": True}, '"uniqueItems", which the engine does not support'),
        (json_schema, {"type": "object", "not": {"type": "string"}}, '"not", which the engine does not support'),
        (json_schema, '{"type":', "not JSON.* line 1 column"),
        (json_schema, {"enum": []}, "admits no token at all"),
        (regex, 3, "must be text"),
    ],
)
def test_bad_grammars_are_told_what_is_wrong(make, source, told):
    with pytest.raises(InputError, match=told):
        make(source, VOCABULARY)


def test_tokens_of_a_byte_level_vocabulary_are_the_bytes_of_texts():
    tokenizer = byte_tokenizer()
    tokens = token_bytes(tokenizer)
    text = "naïve €5\n\t\x00 жы"
    assert b"".join(tokens[i] for i in tokenizer.encode(text)) == text.encode()
    assert [tokens[i] for i in tokenizer.stop_ids] == [None, None]
    padded = Vocabulary.of(tokenizer, 300)
    assert padded.size == 300 and padded.tokens[258:] == (None,) * 42
    with pytest.raises(InputError, match="258 ids"):
        Vocabulary.of(tokenizer, 100)


def test_tokens_of_a_sentencepiece_vocabulary_and_its_byte_fallback():
    pieces = ["<unk>", "<s>", "</s>", "<0xE2>", "<0x82>", "<0xAC>", "\u2581a", "b", "\u2581"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 6, 6, 1, 1, 1],
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokens = token_bytes(Tokenizer.from_gguf(fields))
    assert tokens == [None, None, None, b"\xe2", b"\x82", b"\xac", b" a", b"b", b" "]
