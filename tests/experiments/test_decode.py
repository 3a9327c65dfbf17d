import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import decode
from tests.support.mains import call_main
from tests.support.tiny_folder import write_encoder_decoder_folder, write_tiny_folder

ROOT = Path(__file__).parents[2]
KEYS = ["prompt", "text", "token_ids", "stats", "seconds", "device", "found"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("decode") / "tiny")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, folder):
    """Runs the main with flags; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))

    def run(*flags: str, model: str | None = str(folder)) -> tuple[int, str, str]:
        return call_main(monkeypatch, capsys, decode.main, *(["--model", model] if model else []), *flags)

    return run


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_have_the_documented_keys_and_consistent_counts(run):
    flags = ["--prompt", "one", "--prompt", "two and more", "--max_new_tokens", "5", "--output", "json"]
    code, out, err = run(*flags)
    records = lines(out)
    assert (code, [r["prompt"] for r in records]) == (0, ["one", "two and more"])
    for record in records:
        assert list(record) == KEYS
        assert list(record["seconds"]) == ["load", "compile", "prefill", "decode"]
        assert len(record["token_ids"]) == record["stats"]["emitted"] <= 5
        assert record["stats"]["target_calls"] == record["stats"]["steps"] == record["stats"]["emitted"]
        assert all(seconds >= 0 for seconds in record["seconds"].values())
    assert records[0]["seconds"]["compile"] > 0


def test_a_search_gives_its_other_texts_and_their_scores(run):
    options = ["--options.width", "3", "--options.num_return", "2", "--options.length_penalty", "0.5"]
    flags = ["--method", "beam", *options, "--prompt", "one", "--prompt", "two", "--max_new_tokens", "5"]
    records = lines(run(*flags, "--batch_size", "2", "--output", "json")[1])
    assert len(records) == 2
    for record in records:
        best, second = record["found"]
        assert best["text"] == record["text"] != second["text"] and best["score"] > second["score"]
    code, out, err = run(*flags)
    assert code == 0, err
    assert f"[{records[1]['found'][1]['score']:.4f}] {records[1]['found'][1]['text']}" in out
    code, streamed, _ = run(*flags, "--stream")
    assert code == 0 and all(record["text"] in streamed for record in records), "all at once, when it is certain"


def test_a_prompt_decodes_the_same_alone_in_a_batch_and_streamed(run, tmp_path):
    flags = ["--max_new_tokens", "6", "--prompt", "a", "--prompt", "bcd ef", "--prompt", "xyz"]
    alone = lines(run(*flags, "--output", "json")[1])
    batch = lines(run(*flags, "--output", "json", "--batch_size", "2")[1])
    assert [r["token_ids"] for r in alone] == [r["token_ids"] for r in batch]
    saved = tmp_path / "deep" / "out.jsonl"
    code, out, _ = run(*flags, "--stream", "--save", str(saved))
    assert code == 0 and f"results saved in {saved}" in out
    assert [r["token_ids"] for r in lines(saved.read_text())] == [r["token_ids"] for r in alone]
    assert all(r["text"] in out for r in alone)
    assert list(saved.parent.iterdir()) == [saved]


def test_sampling_settings_and_seeds(run):
    flags = ["--prompt", "abc", "--method", "sample", "--max_new_tokens", "8", "--output", "json"]
    texts = [
        lines(run(*flags, *more)[1])[0]["token_ids"]
        for more in ([], ["--seed", "0"], ["--seed", "1"], ["--sampling.temperature", "0"])
    ]
    assert texts[0] == texts[1] != texts[2]
    greedy = lines(run("--prompt", "abc", "--max_new_tokens", "8", "--output", "json")[1])[0]["token_ids"]
    assert texts[3] == greedy


def test_chat_template_is_used_unless_told_otherwise(run):
    flags = ["--prompt", "hi", "--max_new_tokens", "1", "--output", "json"]
    assert lines(run(*flags)[1])[0]["stats"]["prompt_tokens"] == len("<user>hi<assistant>") + 1  # the end of the turn
    assert lines(run(*flags, "--no-chat")[1])[0]["stats"]["prompt_tokens"] == len("hi")


def test_prompts_file_joins_the_flags(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two", "other": 1}\n')
    code, out, _ = run("--prompts", str(file), "--prompt", "zero", "--max_new_tokens", "2")
    assert code == 0
    assert [out.find(f">>> {name}\n") for name in ("zero", "one", "two")] == sorted(
        out.find(f">>> {name}\n") for name in ("zero", "one", "two")
    )
    assert "tokens/s" in out and "\nall " in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "no prompts: pass --prompt"),
        (["--prompt", " "], "prompt 1 is empty"),
        (["--prompts", "absent.jsonl"], "no such prompts file: absent.jsonl"),
        (["--prompt", "x", "--method", "gredy"], "Did you mean 'greedy'?"),
        (["--prompt", "x", "--options.width", "3"], "unknown option of method 'greedy' 'width'"),
        (["--prompt", "x", "--sampling.temperature", "1.0"], "takes no temperature"),
        (["--prompt", "x", "--method", "sample", "--sampling.top_p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["--prompt", "x" * 200], "the model's context only 128"),
        (["--prompt", "x", "--stream", "--batch_size", "2"], "stream needs batch_size 1"),
        (["--prompt", "x", "--method", "core_infer", "--batch_size", "2"], "set --batch_size 1, got 2"),
        (["--prompt", "x", "--save", "/proc/nowhere/out.jsonl"], "cannot write /proc/nowhere/out.jsonl"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(run, flags, words):
    code, out, err = run(*flags)
    assert (code, out.count(">>>")) == (2, 0)
    assert words in err and "Traceback" not in err


def test_bad_lines_of_a_prompts_file_are_named_by_number(run, tmp_path):
    file = tmp_path / "bad.jsonl"
    for bad in ('{"prompt": 3}', '{"promt": "x"}', "not json", "[1]"):
        file.write_text('{"prompt": "good"}\n' + bad + "\n")
        code, _, err = run("--prompts", str(file))
        assert code == 2 and f"{file}:2:" in err


def test_bad_models(run, tmp_path):
    assert "no such file or folder" in run("--prompt", "x", model="nowhere/model.gguf")[2]
    assert "unknown model 'smolm2'. Did you mean 'smollm2-135m-instruct'?" in run("--prompt", "x", model="smolm2")[2]
    bare = write_tiny_folder(tmp_path / "bare", with_tokenizer=False)
    assert "has no tokenizer.json" in run("--prompt", "x", model=str(bare))[2]


def test_encoder_decoders(run, tmp_path):
    """The prompt is what the encoder reads; methods that need a decoder alone say so."""
    folder = str(write_encoder_decoder_folder(tmp_path / "t5"))
    code, out, err = run("--prompt", "some words", "--max_new_tokens", "4", "--output", "json", model=folder)
    assert code == 0, err
    assert lines(out)[0]["stats"]["emitted"] <= 4
    for method in ("token_recycling", "lserve"):
        code, _, err = run("--prompt", "x", "--method", method, model=folder)
        assert code == 2 and f"method '{method}' needs a decoder-only model, and this t5 model" in err
    code, _, err = run("--prompt", "x" * 600, model=folder)
    assert code == 2 and "the encoder reads 512 at most" in err


def test_an_interrupted_run_keeps_its_finished_lines(run, tmp_path, monkeypatch):
    saved = tmp_path / "out.jsonl"
    original = decode.Runner.decode
    calls = []

    def second_fails(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(decode.Runner, "decode", second_fails)
    code, _, err = run("--prompt", "a", "--prompt", "b", "--max_new_tokens", "2", "--save", str(saved))
    assert (code, err) == (130, "interrupted\n")
    assert not saved.exists()
    assert [r["prompt"] for r in lines((tmp_path / "out.jsonl.partial").read_text())] == ["a"]


def test_as_a_program_an_unknown_key_exits_with_2_and_no_traceback():
    command = [sys.executable, "-m", "experiments.decode", "--max_new_token", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--max_new_tokens" in done.stderr and "Traceback" not in done.stderr
