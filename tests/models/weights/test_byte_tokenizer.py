"""The tokenizer of bytes: every text comes back, a letter is its bytes, and the template ends every turn."""

import pytest

from models.weights.byte_tokenizer import byte_tokenizer
from models.weights.tokenizer import Tokenizer


@pytest.mark.parametrize("text", ["", "reverse tamo\n", " a  b\t", "né → 語 🙂", "\x00\x7f"])
def test_texts_come_back_byte_by_byte(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and all(i < 256 for i in ids)
    assert tokenizer.decode(ids) == text


def test_every_byte_has_an_id_of_its_own():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 258
    texts = [chr(point) for point in (*range(128), *range(0x80, 0x800), *range(0x1000, 0x11000, 0x1000), 0x10FFFF)]
    seen = {i for text in texts if not 0xD800 <= ord(text) < 0xE000 for i in tokenizer.encode(text)}
    assert seen < set(range(256)) and len(seen) > 200  # 13 bytes are in no valid UTF-8


def test_both_ends_stop_a_generation_and_are_left_out_of_texts():
    tokenizer = byte_tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (None, 257, (256, 257))
    assert tokenizer.encode("a<|im_end|><|endoftext|>")[1:] == [256, 257]
    assert tokenizer.decode([*tokenizer.encode("a"), 256, 257]) == "a"


def test_a_prompt_is_the_beginning_of_its_conversation():
    tokenizer = byte_tokenizer()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    whole = tokenizer.chat(turns, add_generation_prompt=False)
    assert whole == tokenizer.chat("hi") + "yes<|im_end|>"


def test_it_is_the_same_after_saving(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("né<|im_end|>") == tokenizer.encode("né<|im_end|>")
    assert (again.eos_id, again.stop_ids, again.chat_template) == (257, (256, 257), tokenizer.chat_template)
