"""Vocabularies of GGUF files, on tiny ones whose right pieces follow by hand from the rules of each kind."""

import json
import unicodedata

import pytest
import tokenizers
from tokenizers import models as bpe_models
from tokenizers import pre_tokenizers, trainers

from models.errors import InputError
from models.weights.gguf_vocabulary import PRE_TOKENIZERS, merges_from_scores
from models.weights.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [
    "1 2",
    "12 3",
    "123 4",
    "1234 5",
    "Ġ 12",
    "L L",
    "LL x",
    "' LL",
    "' l",
    "'l l",
    "Ċ Ċ",
    "Ġ Ġ",
    "ĠĠ Ġ",
    "Ġ x",
    ") Ċ",
]
AWKWARD = (
    "It's I'LL 12345  x   x\t\ty\r\n\r\n(x)\n\n\n  e\u0301 é नमस्ते\u200d 👩\u200d👧 שָׁ"
    " 東京 \x00\x07 ½٣\u3000<|im_end|>!<tool> end  "
)


def byte_level(pre, merges=MERGES, words=(), **more):
    """The fields of a byte-level vocabulary: the 256 bytes, what the merges make, `words`, and four added tokens."""
    tokens = ALPHABET + [merge.replace(" ", "") for merge in merges] + list(words)
    types = [1] * len(tokens) + [3, 3, 3, 4]
    tokens = [*tokens, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": list(merges), "token_type": types}
    fields |= {"bos_token_id": tokens.index("<|endoftext|>"), "eos_token_id": tokens.index("<|im_end|>"), **more}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def sentencepiece(**more):
    """The fields of a SentencePiece vocabulary that knows "hello", some spaces, and every byte."""
    control = ["<pad>", "</s>", "<s>", "<unk>"]
    user_defined = ["\n\n", "  ", "   ", "<table>"]
    scores = {"lo": -1, "▁h": -2, "el": -3, "hel": -4, "▁hel": -5, "hello": -6, "▁hello": -7, "▁x": -8}
    letters = {letter: -100 - index for index, letter in enumerate("▁helox")}
    by_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*control, *user_defined, *by_byte, *scores, *letters]
    types = [3] * 3 + [2] + [4] * len(user_defined) + [6] * 256 + [1] * (len(scores) + len(letters))
    filler = [-1000.0] * 8 + [0.0] * 256
    fields = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types}
    fields |= {"scores": filler + [float(v) for v in [*scores.values(), *letters.values()]]}
    fields |= {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def pieces(fields, text, add_special=False):
    tokenizer = Tokenizer.from_gguf(fields)
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, add_special=add_special)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Digits: GPT-2 keeps them together and takes a space in front, SmolLM and Qwen2 cut each, Llama 3 makes threes.
        ("x12345", {"gpt-2": "x 12345", "smollm": "x 1 2 3 4 5", "qwen2": "x 1 2 3 4 5", "llama-bpe": "x 123 4 5"}),
        ("x 12", {"gpt-2": "x Ġ12", "smollm": "x Ġ 1 2", "qwen2": "x Ġ 1 2", "llama-bpe": "x Ġ 12"}),
        # Contractions: capital ones only in the newer expressions.
        ("x'll", dict.fromkeys(["gpt-2", "smollm", "qwen2", "llama-bpe"], "x 'll")),
        ("x'LLx", {"gpt-2": "x ' LLx", "smollm": "x ' LLx", "qwen2": "x 'LL x", "llama-bpe": "x 'LL x"}),
        # The last of several spaces belongs to the word.
        ("x   x", dict.fromkeys(["gpt-2", "smollm", "qwen2", "llama-bpe"], "x ĠĠ Ġx")),
        # Line ends: joined to punctuation before them in the newer expressions.
        ("x)\nx", {"gpt-2": "x ) Ċ x", "smollm": "x ) Ċ x", "qwen2": "x )Ċ x", "llama-bpe": "x )Ċ x"}),
        ("x\n\nx", {"gpt-2": "x Ċ Ċ x", "smollm": "x Ċ Ċ x", "qwen2": "x ĊĊ x", "llama-bpe": "x ĊĊ x"}),
    ],
)
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_each_kind_cuts_text_its_own_way(pre, text, expected):
    assert pieces(byte_level(pre), text) == expected[pre].split(" ")


def test_only_qwen2_composes_letters():
    merges = ["Ã ©"]  # the two bytes of é
    for pre in PRE_TOKENIZERS:
        assert (pieces(byte_level(pre, merges), "e\u0301") == ["Ã©"]) == (pre == "qwen2")


def test_llama_takes_a_whole_word_although_no_merge_makes_it():
    assert pieces(byte_level("llama-bpe", words=["hello"]), "hello") == ["hello"]
    assert pieces(byte_level("qwen2", words=["hello"]), "hello") == list("hello")


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_round_trip_of_hand_made_and_trained_vocabularies(pre):
    backend = tokenizers.Tokenizer(bpe_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator([AWKWARD] * 3, trainers.BpeTrainer(vocab_size=330, show_progress=False))
    trained = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    expected = unicodedata.normalize("NFC", AWKWARD) if pre == "qwen2" else AWKWARD
    counts = []
    for vocabulary in (MERGES, trained):
        tokenizer = Tokenizer.from_gguf(byte_level(pre, vocabulary))
        ids = tokenizer.encode(AWKWARD, add_special=False)
        assert tokenizer.decode(ids, skip_special=False) == expected
        counts.append(len(ids))
    assert counts[1] < counts[0] < len(AWKWARD.encode())


@pytest.mark.parametrize(
    ("pre", "more", "before", "after"),
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("qwen2", {"add_eos_token": True}, False, True),
        ("llama-bpe", {"bos_token_id": None}, False, False),
    ],
)
def test_bos_and_eos_come_where_the_file_wants_them(pre, more, before, after):
    fields = byte_level(pre, **more)
    expected = ["<|endoftext|>"] * before + ["x"] + ["<|im_end|>"] * after
    assert pieces(fields, "x", add_special=True) == expected
    assert pieces(fields, "x") == ["x"]


def test_control_tokens_are_special_and_user_defined_ones_are_only_whole():
    tokenizer = Tokenizer.from_gguf(byte_level("smollm"))
    ids = tokenizer.encode("x<|im_end|><tool>x")
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["x", "<|im_end|>", "<tool>", "x"]
    assert tokenizer.decode(ids) == "x<tool>x"
    assert tokenizer.decode(ids, skip_special=False) == "x<|im_end|><tool>x"


def test_bos_and_eos_are_special_whatever_their_type():
    fields = byte_level("smollm")
    fields.pop("tokenizer.ggml.token_type")
    tokenizer = Tokenizer.from_gguf(fields)
    assert tokenizer.decode(tokenizer.encode("x<|im_end|>")) == "x"


def test_rows_that_pad_the_embedding_are_no_ids():
    fields = byte_level("qwen2")
    size = len(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    fields["tokenizer.ggml.token_type"] += [5, 5]
    tokenizer = Tokenizer.from_gguf(fields)
    assert tokenizer.vocab_size == size
    assert tokenizer.decode(tokenizer.encode("[PAD1]") + [size + 1]) == "[PAD1]"
    fields["tokenizer.ggml.token_type"][-1] = 1  # a used row behind it keeps the unused one in place
    assert Tokenizer.from_gguf(fields).vocab_size == size + 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", ["▁hello"]),
        ("hello hello", ["▁hello", "▁hello"]),
        ("hel", ["▁hel"]),
        ("hlo", ["▁h", "lo"]),
        (" hello", ["▁▁", "hello"]),
        ("hello    x", ["▁hello", "▁▁▁", "▁x"]),
        ("x\nx", ["▁x", "<0x0A>", "x"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        ("x<table>x", ["▁x", "<table>", "▁x"]),
        ("", []),
    ],
)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(text, expected):
    assert pieces(sentencepiece(), text) == expected


def test_sentencepiece_without_a_space_in_front():
    fields = sentencepiece(add_space_prefix=False)
    assert pieces(fields, "hello hello") == ["hello", "▁hello"]
    assert pieces(fields, "x\n\n  x") == ["x", "\n\n", "▁▁", "x"]
    tokenizer = Tokenizer.from_gguf(fields)
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD
    assert tokenizer.decode(tokenizer.encode(" x")) == " x"


def test_sentencepiece_takes_the_space_in_front_away_again():
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    for text in ("hello", " hello", "  x", "é\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_puts_bos_first_unless_told_not_to():
    assert pieces(sentencepiece(), "x", add_special=True) == ["<s>", "▁x"]
    assert pieces(sentencepiece(add_bos_token=False), "x", add_special=True) == ["▁x"]


def test_merges_rank_by_score_then_by_the_longer_left_part():
    tokens = ["a", "b", "ab", "abab", "aba", "ba", "<c>", "a<c>"]
    scores = [-9.0, -9.0, -2.0, -1.0, -3.0, -3.0, 0.0, 0.0]
    types = [1, 1, 1, 1, 1, 1, 3, 6]
    expected = [("aba", "b"), ("ab", "ab"), ("a", "b"), ("ab", "a"), ("a", "ba"), ("b", "a")]
    assert merges_from_scores(tokens, scores, types) == expected


def without(fields, name):
    return {key: value for key, value in fields.items() if key != f"tokenizer.ggml.{name}"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (byte_level("qwen-2"), "unknown pre-tokenizer.*'qwen-2'.*Did you mean 'qwen2'.*llama-bpe.*smollm"),
        (byte_level("smollm", model="gpt-2"), "unknown kind of vocabulary.*gpt2.*llama"),
        (without(byte_level("smollm"), "tokens"), "no tokenizer.ggml.tokens"),
        (without(byte_level("smollm"), "merges"), "no tokenizer.ggml.merges"),
        (without(sentencepiece(), "scores"), "no tokenizer.ggml.scores"),
        ({}, "no tokenizer.ggml.tokens"),
        (byte_level("smollm", token_type=[1]), "token_type has 1 items for 275 tokens"),
        (sentencepiece(scores=[0.0]), "scores has 1 items"),
        (byte_level("smollm", eos_token_id=5000), "eos_token_id is 5000"),
        (byte_level("smollm", padding_token_id=-1), "padding_token_id is -1"),
        (byte_level("smollm") | {"tokenizer.ggml.merges": ["q z"]}, "inconsistent"),
        (byte_level("smollm") | {"tokenizer.ggml.merges": ["qz"]}, "inconsistent"),
    ],
)
def test_fields_that_do_not_fit(fields, words):
    with pytest.raises(InputError, match=words):
        Tokenizer.from_gguf(fields)


def test_fields_are_not_changed():
    fields = sentencepiece()
    copy = {key: list(value) if isinstance(value, list) else value for key, value in fields.items()}
    Tokenizer.from_gguf(fields)
    assert fields == copy
