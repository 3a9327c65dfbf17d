"""Rows: which tokens are to be predicted, prompts as decoding sees them, and what becomes of rows that are too long."""

import dataclasses

import numpy as np
import pytest

from finetune.corpus import Example
from finetune.rows import Row, as_chat, encode, fit
from models.errors import InputError
from models.weights.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def learnt(row):
    """(text that is only read, text that is to be predicted) of a row, ends written out."""
    sides = [
        [token for token, target in zip(row.tokens, row.targets, strict=True) if target == side]
        for side in (False, True)
    ]
    return tuple(TOKENIZER.decode(side, skip_special=False) for side in sides)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_of_a_text_all_but_the_first_token_is_predicted():
    assert learnt(encode(TOKENIZER, "abc")) == ("a", "bc<|endoftext|>")
    assert learnt(encode(TOKENIZER, "abc<|endoftext|>")) == ("a", "bc<|endoftext|>")


def test_of_an_example_the_completion_is_predicted():
    row = encode(TOKENIZER, Example("reverse ab\n", "ba"))
    assert learnt(row) == ("reverse ab\n", "ba<|endoftext|>")
    assert row.tokens[: row.targets.index(True)] == TOKENIZER.encode("reverse ab\n")
    assert learnt(encode(TOKENIZER, Example("", "ba"))) == ("b", "a<|endoftext|>")


def test_of_a_conversation_the_assistants_turns_are_predicted():
    row = encode(TOKENIZER, [user("a"), assistant("b"), user("c"), assistant("d"), user("e")])
    assert learnt(row) == ("<user>a<|im_end|><assistant><user>c<|im_end|><assistant>", "b<|im_end|>d<|im_end|>")
    assert row.tokens[-1] == TOKENIZER.stop_ids[0]
    example = Example("reverse ab\n", "ba")
    row = encode(TOKENIZER, as_chat(example))
    assert row.tokens[: row.targets.index(True)] == TOKENIZER.encode_chat("reverse ab")


def test_white_space_behind_a_turn_is_not_predicted():
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n{% endif %}"
    lines = dataclasses.replace(TOKENIZER, chat_template=template)
    row = encode(lines, [user("a"), assistant("b"), user("c"), assistant("d")])
    assert learnt(row) == ("user\na<|im_end|>\nassistant\n\nuser\nc<|im_end|>\nassistant\n", "b<|im_end|>d<|im_end|>")


class Merging:
    """Stands for a tokenizer that joins letters across a prompt's end: "ab" is one token behind <bos>."""

    eos_id = None

    def encode(self, text, add_special=True):
        return [1] * add_special + [ord(c) for c in text.replace("ab", "X")]


def test_the_prompt_keeps_the_tokens_that_it_has_alone():
    row = encode(Merging(), Example("a", "bc"))
    assert row.tokens == [1, *map(ord, "abc")] and row.targets == [False, False, True, True]
    assert encode(Merging(), Example("a", "cab")).tokens == [1, *map(ord, "acX")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([user("a")], "no turn of the role 'assistant'"),
        ([assistant("a"), user("b")], "starts with the assistant"),
        ([user("a"), {"role": "assistant"}], "message 1"),
    ],
)
def test_conversations_with_nothing_to_learn_are_refused(messages, message):
    with pytest.raises(InputError, match=message):
        encode(TOKENIZER, messages)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}|{% endfor %}"
    rewriting = dataclasses.replace(TOKENIZER, chat_template=template)
    with pytest.raises(InputError, match="turn 2 otherwise"):
        encode(rewriting, [user("a"), assistant("b"), user("c"), assistant("d")])


def test_long_texts_are_cut_so_that_every_token_is_predicted_once():
    texts = [encode(TOKENIZER, "a" * size) for size in range(1, 14)]
    rows, notes = fit(texts, 5, cut=True)
    assert rows.lengths.max() == 5 and rows.targets.sum() == sum(sum(row.targets) for row in texts)
    assert not rows.targets[rows.starts[:-1]].any()
    assert notes == ["9 of 13 texts cut into pieces: longer than 5 tokens (the longest has 14)"]
    pieces, _ = fit([encode(TOKENIZER, "abcdefg")], 4, cut=True)
    assert TOKENIZER.decode(pieces.tokens, skip_special=False) == "abcddefgg<|endoftext|>"


def test_long_answers_are_left_out_and_so_is_what_has_nothing_to_predict():
    given = [Row([1, 2, 3], [False, True, True]), Row([1, 2, 3, 4], [False] * 3 + [True]), Row([5], [False])]
    rows, notes = fit(given, 3, cut=False)
    np.testing.assert_array_equal(rows.tokens, [1, 2, 3])
    assert len(rows) == 1 and rows.starts.tolist() == [0, 3]
    assert "1 of 3 texts left out: longer than 3 tokens (the longest has 4)" in notes
    assert "1 of 3 texts left out: nothing in them is to be predicted" in notes


def test_rows_of_one_token_are_too_short():
    with pytest.raises(InputError, match="length must be at least 2"):
        fit([], 1, cut=True)
