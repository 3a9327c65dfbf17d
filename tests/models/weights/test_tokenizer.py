"""Tokenizers: ids, special ids, chat, files, and the ids that Hugging Face gives for the models on this machine."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from models.errors import InputError
from models.weights.fetch import cache_folder
from models.weights.gguf import GGUFFile
from models.weights.tokenizer import Tokenizer, check_vocabulary

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokenizer_ids.json").read_text())
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def backend():
    """A byte-level tokenizer of 256 bytes, "hello", six special tokens and a whole one, which puts <bos> first."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "hel", "lo", "hello"]
    merges = [("h", "e"), ("he", "l"), ("l", "o"), ("hel", "lo")]
    result = tokenizers.Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    result.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    bos = result.token_to_id("<bos>")
    result.post_processor = processors.TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", bos)])
    return result


def write_folder(folder, backend, **files):
    """Writes a Hugging Face folder: tokenizer.json and JSON files by stem."""
    backend.save(str(folder / "tokenizer.json"))
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": CHATML}
    return Tokenizer.from_folder(write_folder(tmp_path, backend(), tokenizer_config=names))


def ids_of(tokenizer, *tokens):
    return [tokenizer.backend.token_to_id(token) for token in tokens]


def test_encode_adds_bos_on_request_and_parses_special_tokens(tokenizer):
    assert tokenizer.encode("hello") == ids_of(tokenizer, "<bos>", "hello")
    assert tokenizer.encode("hello<eos>", add_special=False) == ids_of(tokenizer, "hello", "<eos>")
    assert tokenizer.encode("", add_special=False) == []


def test_decode_skips_special_tokens_on_request_and_keeps_spaces(tokenizer):
    text = " hello , it 's  é<tool>\n<eos>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.removesuffix("<eos>")
    assert tokenizer.decode(ids, skip_special=False) == "<bos>" + text
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("wrap", [tuple, np.asarray, lambda ids: np.asarray(ids, np.uint32)])
def test_decode_takes_any_sequence_of_integers(tokenizer, wrap):
    assert tokenizer.decode(wrap(tokenizer.encode("hello"))) == "hello"


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("hello"), tokenizer.vocab_size, 10**6]) == "hello"


@pytest.mark.parametrize("ids", [[[1, 2]], 3, [-1], [1.0], ["a"]])
def test_decode_refuses_anything_else(tokenizer, ids):
    with pytest.raises(InputError, match="one sequence of ids"):
        tokenizer.decode(ids)


def test_encode_refuses_what_is_not_text(tokenizer):
    with pytest.raises(InputError, match="one string, got list"):
        tokenizer.encode(["hello"])
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_special_ids(tokenizer):
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == ids_of(tokenizer, "<bos>", "<eos>", "<pad>")
    assert list(tokenizer.stop_ids) == sorted(ids_of(tokenizer, "<eos>", "<|im_end|>", "<|endoftext|>"))
    assert tokenizer.vocab_size == 256 + 4 + 7
    assert "hello" not in repr(tokenizer)


def test_chat(tokenizer):
    expected = "<bos><|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.chat("hello", add_generation_prompt=False) == expected
    turns = [{"role": "user", "content": "hello"}]
    assert tokenizer.chat(turns) == expected + "<|im_start|>assistant\n"


def test_encode_chat_has_one_bos(tokenizer):
    ids = tokenizer.encode_chat("hello")
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.chat("hello")


def test_no_chat_template(tmp_path):
    bare = Tokenizer.from_folder(write_folder(tmp_path, backend()))
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, None)
    with pytest.raises(InputError, match="no chat template"):
        bare.chat("hello")
    with pytest.raises(InputError, match="no chat template"):
        bare.encode_chat("hello")


def test_save_and_read_again(tokenizer, tmp_path):
    folder = tmp_path / "deep" / "copy"
    tokenizer.save(folder)
    again = Tokenizer.from_folder(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for name in ("bos_id", "eos_id", "pad_id", "stop_ids", "chat_template", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    text = "hello <tool> 東京\t<eos>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_failed_save_leaves_the_old_file_and_no_other(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="cannot save a tokenizer in .*disk full"):
        tokenizer.save(folder)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
    assert (folder / "tokenizer.json").read_text() == "old"


def test_save_refuses_a_file_in_place_of_a_folder(tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="name a folder"):
        tokenizer.save(tmp_path / "file")


def test_folder_reads_special_tokens_wherever_they_are(tmp_path):
    folder = write_folder(
        tmp_path,
        backend(),
        special_tokens_map={"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<pad>"},
        tokenizer_config={"eos_token": {"content": "<eos>"}},
        generation_config={"eos_token_id": [7, 5]},
    )
    tokenizer = Tokenizer.from_folder(folder)
    bos, eos = ids_of(tokenizer, "<bos>", "<eos>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos, eos, None)
    assert tokenizer.stop_ids[:2] == (5, 7) and eos in tokenizer.stop_ids
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.from_folder(tmp_path / "copy").stop_ids == tokenizer.stop_ids


def test_folder_takes_eos_from_the_generation_config_when_nothing_else_names_one(tmp_path):
    folder = write_folder(tmp_path, backend(), generation_config={"eos_token_id": 5})
    assert Tokenizer.from_folder(folder).eos_id == 5


def test_folder_template_in_its_own_file_goes_first(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    folder = write_folder(tmp_path, backend(), tokenizer_config={"chat_template": named})
    assert Tokenizer.from_folder(folder).chat("hello") == "d"
    (folder / "chat_template.jinja").write_text("own {{ messages[0].content }}")
    assert Tokenizer.from_folder(folder).chat("hello") == "own hello"


def test_folder_forgets_stored_truncation_and_padding(tmp_path):
    stored = backend()
    stored.enable_truncation(4)
    stored.enable_padding(length=16)
    assert len(stored.encode("x").ids) == 16
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, stored))
    assert len(tokenizer.encode("x")) == 2
    assert len(tokenizer.encode("x y z x y z")) == 12


def test_folder_errors(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="not a readable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, backend(), tokenizer_config=["eos_token"])
    with pytest.raises(InputError, match="tokenizer_config.json.*JSON list, not an object"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json.*not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_check_vocabulary(tokenizer):
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(tokenizer, tokenizer.vocab_size + 100)
    with pytest.raises(InputError, match="mismatched tokenizer: it has 267 ids, but the model has rows for 266"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)


@pytest.mark.parametrize("name", sorted(GOLDEN["ids"]))
def test_ids_are_those_of_hugging_face(name):
    """A difference means that our reading of the model's tokenizer changed (see tests/golden/make_tokenizer_ids.py)."""
    paths = sorted((cache_folder() / "models" / name).glob("*.gguf"))
    if not paths:
        pytest.skip(f"{name} is not in the cache folder; fetch it with: python -m models.weights.fetch {name}")
    file = GGUFFile(paths[0])
    tokenizer = Tokenizer.from_gguf(file.fields)
    for key, text in GOLDEN["texts"].items():
        assert tokenizer.encode(text) == GOLDEN["ids"][name][key], key
    check_vocabulary(tokenizer, len(file.fields["tokenizer.ggml.tokens"]))
