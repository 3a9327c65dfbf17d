"""Data from code, files and dataset folders: what is read, how it is split, and what is said of bad input."""

import dataclasses
import json
import socket
import subprocess
import sys

import pytest

from experiments.schema import build
from finetune.code_tokenizer import code_tokenizer
from finetune.data import code_examples, read_data
from finetune.data_configs import CodeData, DataConfig, GeneratedData
from finetune.rows import Pairs
from finetune.sources import Columns, FileData, HubData
from models.errors import InputError
from models.weights.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
PAIRS = [{"question": f"double {i}\n", "answer": str(2 * i)} for i in range(20)]
PAIR_COLUMNS = Columns(prompt="question", completion="answer")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing here may reach for the network, or leave a copy in the user's cache."""

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    import datasets

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(rows):
    return sorted(TOKENIZER.decode(rows.tokens[a:b]) for a, b in zip(rows.starts[:-1], rows.starts[1:], strict=True))


def read(config, length=64):
    return read_data(config, TOKENIZER, length)


def test_generated_data_has_rows_and_questions():
    data = read(GeneratedData(tasks=("reverse", "add"), size=40, test_size=10))
    assert (len(data.train), len(data.test), len(data.questions), data.notes) == (40, 10, 10, ())
    assert not set(texts(data.train)) & set(texts(data.test))
    for question in data.questions:
        assert TOKENIZER.decode(question.tokens) == question.example.prompt
        assert question.example.prompt + question.example.completion in texts(data.test)


@pytest.mark.parametrize("source", ["generated", "library"])
def test_descriptions_are_read_and_functions_are_written(source):
    tokenizer, config = code_tokenizer(), CodeData(source=source, size=12, test_size=6)
    data = read_data(config, tokenizer, 20_000, Pairs(0, 4000))
    assert (len(data.train), len(data.test), len(data.questions)) == (12, 6, 6)
    rows, question = data.test, data.questions[0]
    assert tokenizer.decode(rows.sources[: rows.source_starts[1]]) == question.example.prompt
    row = rows.tokens[: rows.starts[1]].tolist()
    assert row[0] == 0 and row[-1] == tokenizer.eos_id and tokenizer.decode(row) == question.example.completion
    assert not {one.example.prompt for one in data.questions} & {one.prompt for one in code_examples(config, False)}
    with pytest.raises(InputError, match="size must be at least 1"):
        CodeData(size=0)


def test_generated_data_as_chat():
    data = read(GeneratedData(tasks=("reverse",), size=4, test_size=2, chat=True))
    question = data.questions[0]
    tokens, example = question.tokens, question.example
    assert tokens == TOKENIZER.encode_chat(example.prompt.strip())
    assert data.train.tokens[-1] == TOKENIZER.stop_ids[0]


def test_a_file_of_prompts_is_split_by_what_is_in_it(tmp_path):
    rows = [*PAIRS, *PAIRS[:5]]
    config = FileData(path=write(tmp_path / "a.jsonl", rows), columns=PAIR_COLUMNS, test_share=0.25)
    data = read(config)
    train, test = set(texts(data.train)), set(texts(data.test))
    assert len(test) == 5 and len(train) == 15 and not train & test
    assert len(data.train) + len(data.test) == 25
    turned = read(dataclasses.replace(config, path=write(tmp_path / "b.jsonl", rows[::-1])))
    assert set(texts(turned.test)) == test
    assert len(read(dataclasses.replace(config, test_share=0)).test) == 0


def test_kinds_of_files_give_the_same_rows(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = [{"text": f"text {i}\nof two lines"} for i in range(4)]
    (tmp_path / "odd [1].txt").write_text("\n\n".join(row["text"] for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    write(tmp_path / "d.JSONL", rows)
    for name in ("odd [1].txt", "b.json", "c.parquet", "d.JSONL"):
        data = read(FileData(path=tmp_path / name, test_share=0))
        assert texts(data.train) == [row["text"] for row in rows], name
    assert {path.suffix for path in (tmp_path / "cache").rglob("*")} <= {".lock"}  # no copy of what was read


def test_a_file_of_conversations(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = write(tmp_path / "a.jsonl", [{"talk": turns}] * 2)
    data = read(FileData(path=path, columns=Columns(messages="talk"), test_share=0))
    wanted = TOKENIZER.encode("yes<|im_end|>")
    assert data.train.tokens[data.train.targets].tolist() == wanted * 2 and data.questions == ()


def test_prompts_as_chat(tmp_path):
    columns = dataclasses.replace(PAIR_COLUMNS, chat=True)
    data = read(FileData(path=write(tmp_path / "a.jsonl", PAIRS), columns=columns, test_path=tmp_path / "a.jsonl"))
    assert len(data.questions) == 20 and data.questions[3].tokens == TOKENIZER.encode_chat("double 3")


def test_a_test_file_and_a_limit(tmp_path):
    train, test = write(tmp_path / "a.jsonl", PAIRS), write(tmp_path / "b.jsonl", PAIRS[:7])
    data = read(FileData(path=train, test_path=test, columns=PAIR_COLUMNS, limit=5))
    assert texts(data.train) == texts(data.test) == sorted(row["question"] + row["answer"] for row in PAIRS[:5])


@pytest.mark.parametrize("limit", [None, 3])
def test_a_dataset_folder_has_splits(tmp_path, limit):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", PAIRS)
    write(folder / "test.jsonl", [{"question": "q", "answer": "a"}])
    config = HubData(name=str(folder), test_split="test", columns=PAIR_COLUMNS, limit=limit)
    data = read(config)
    assert len(data.train) == (limit or 20) and texts(data.test) == ["qa"]
    with pytest.raises(InputError, match=r"unknown split of .* 'tests'\. Did you mean 'test'"):
        read(dataclasses.replace(config, test_split="tests"))


def test_long_rows_are_cut_or_left_out_and_said(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a" * 20, "more": "b"}, {"text": "c", "more": "d"}])
    data = read(FileData(path=path, test_share=0), length=8)
    assert data.train.targets.sum() == 20 + 1 and data.train.lengths.max() == 8
    assert data.notes == ("train: 1 of 2 texts cut into pieces: longer than 8 tokens (the longest has 21)",)
    pairs = Columns(prompt="text", completion="more")
    data = read(FileData(path=path, columns=pairs, test_path=path), length=8)
    assert len(data.train) == 1 and len(data.questions) == 1 and "1 of 2 texts left out" in data.notes[0]
    with pytest.raises(InputError, match=r"no rows to train on with length 2: 2 of 2 texts left out"):
        read(FileData(path=path, columns=pairs, test_share=0), length=2)


def test_texts_without_a_word_are_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": " \n"}])
    assert texts(read(FileData(path=path, test_share=0)).train) == ["a"]
    with pytest.raises(InputError, match="no rows to learn from"):
        read(FileData(path=write(tmp_path / "b.jsonl", [{"text": ""}])))


def bad_file(rows, **options):
    def config(folder):
        return FileData(path=write(folder / "a.jsonl", rows), **({"columns": PAIR_COLUMNS} | options))

    return config


TALK = Columns(messages="talk")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda folder: FileData(), "data.path is not set"),
        (lambda folder: HubData(), "data.name is not set"),
        (lambda folder: HubData(name=str(write(folder / "a.jsonl", PAIRS))), "type: file"),
        (lambda folder: HubData(name=str(folder / "nothing")), "cannot load the dataset"),
        (lambda folder: FileData(path=write(folder / "a.jsonl", PAIRS).with_stem("b")), r"did you mean .*a\.jsonl"),
        (lambda folder: FileData(path=write(folder / "a.csv", PAIRS)), r"files of data end in \.jsonl"),
        (bad_file([]), "is empty"),
        (bad_file(PAIRS, columns=Columns("questions")), "unknown column of .* 'questions'. Did you mean 'question'"),
        (bad_file([*PAIRS, {"answer": "a"}]), "row 21 has no text in 'question'"),
        (bad_file([{"question": 3, "answer": "a"}]), "row 1 has no text in 'question'"),
        (bad_file([{"talk": TURNS}, {"talk": TURNS[:1]}], columns=TALK), "row 2: the conversation has no turn"),
        (bad_file([{"talk": "hi"}], columns=TALK), "row 1 has no list of messages in 'talk'"),
        (bad_file(PAIRS[:1]), "no rows to train on"),
        (lambda folder: GeneratedData(tasks=("revers",)), "unknown generated task 'revers'. Did you mean 'reverse'"),
    ],
)
def test_bad_data_is_named(config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read(config(tmp_path))


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"text": "a"}\n{"text"\n'), ("a.parquet", "nothing")])
def test_broken_files_are_named(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        read(FileData(path=tmp_path / name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Columns(prompt="a"), "both prompt and completion"),
        (lambda: Columns(prompt="a", completion="b", messages="c"), "not both"),
        (lambda: FileData(test_share=1.0), "test_share"),
        (lambda: HubData(limit=0), "limit"),
        (lambda: GeneratedData(size=0), "size"),
    ],
)
def test_configs_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_configs_are_told_apart_by_type():
    value = {"type": "file", "path": "a.jsonl", "columns": {"prompt": "q", "completion": "a"}}
    assert build(DataConfig, value, "data", {"": "x.yaml"}).columns == Columns(prompt="q", completion="a")
    assert build(DataConfig, {"type": "generated"}, "data", {"": "x.yaml"}) == GeneratedData()
    with pytest.raises(InputError, match="Did you mean 'file'"):
        build(DataConfig, {"type": "files"}, "data", {"": "x.yaml"})


def test_the_library_is_imported_only_to_read():
    code = "import finetune.data, sys; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
