"""The cascade over shards: counts that add up, a killed run that goes on to the same files, bad lines by number."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import cascade, clean_corpus
from experiments.clean_corpus import CleanConfig, clean
from finetune.cleaning.near_copies import NearCopiesConfig
from finetune.cleaning.planted import WHOLE, planted_corpus
from finetune.cleaning.quality import QualityConfig
from finetune.cleaning.rules import RulesConfig
from models.errors import InputError


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder of three shards with planted faults, and the reference beside it."""
    folder = tmp_path_factory.mktemp("raw")
    texts, reference = planted_corpus(90, 0)
    for shard in range(3):
        lines = [json.dumps({"text": p.text, "fault": p.fault, "n": n}) for n, p in enumerate(texts) if n % 3 == shard]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "good").mkdir()
    (folder / "good" / "reference.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in reference[:40]))
    return folder


def config(raw, out, **more):
    quality = QualityConfig(raw / "good" / "reference.jsonl", 0.1)
    return CleanConfig(raw, out, quality=quality, near_copies=NearCopiesConfig(bands=10, rows=8), **more)


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """(the folder of a run that was not disturbed, its counts)."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, clean(config(raw, out))


def files(out: Path):
    """{path: bytes} of everything that a run leaves but its config."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("config.yaml", ".lock")
    }


def lines(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_counts_add_up(raw, whole):
    out, counts = whole
    assert [one.stage for one in counts] == ["rules", "quality", "near_copies", "repeats"]
    assert counts[0].texts_in == 90 == len(lines(raw))
    for before, after in zip(counts, counts[1:], strict=False):
        assert (before.texts_out, before.words_out) == (after.texts_in, after.words_in)
    for place, one in enumerate(counts, 1):
        assert one.texts_in - one.texts_out == sum(one.dropped.values())
        left = lines(out / f"{place}-{one.stage}")
        assert (len(left), sum(len(x["text"].split()) for x in left)) == (one.texts_out, one.words_out)
    assert json.loads((out / "counts.json").read_text())[0]["dropped"] == counts[0].dropped
    assert lines(out / "corpus") == lines(out / "4-repeats")
    assert not list(out.rglob("*.partial"))


def test_faults_go_and_texts_stay(raw, whole):
    before, after = ({kind: [x for x in lines(f) if x["fault"] == kind] for kind in {x["fault"] for x in lines(raw)}}
                     for f in (raw, whole[0] / "corpus"))  # fmt: skip
    assert len(after[""]) >= 0.8 * len(before[""])
    for kind in set(before) - {"", "advertisement", "copy", "near copy, 1 word in 100", *WHOLE}:
        assert not after[kind], kind
    copied = sum(len(after[kind]) for kind in ("", "copy", "near copy, 1 word in 100"))
    assert copied <= len(before[""]), "of a text and its copies one is left"
    assert all("<email>" in x["text"] and "@" not in x["text"] for x in after["address and number"])
    noticed = ["volunteers" in x["text"] for x in after["notice behind it"]]
    assert sum(noticed) == 1 < len(noticed), "the first notice stays"


@pytest.mark.parametrize("writes", [1, 6, 11, 15])
def test_a_killed_run_goes_on_to_the_same_files(raw, whole, tmp_path, monkeypatch, writes):
    class Killed(BaseException):
        pass

    left, keep = [writes], cascade.keep

    def dies(*args, **values):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        keep(*args, **values)

    monkeypatch.setattr(cascade, "keep", dies)
    with pytest.raises(Killed):
        clean(config(raw, tmp_path / "out"))
    assert not (tmp_path / "out" / "corpus").exists()
    monkeypatch.setattr(cascade, "keep", keep)
    assert clean(config(raw, tmp_path / "out")) == whole[1]
    assert files(tmp_path / "out") == files(whole[0])


def test_what_is_done_is_not_done_again(raw, whole, monkeypatch):
    monkeypatch.setattr(cascade, "_apply", None)
    monkeypatch.setattr(cascade, "_decide", None)
    assert clean(config(raw, whole[0])) == whole[1]


def test_other_settings_and_other_shards_are_done_again(raw, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for path in raw.glob("*.jsonl"):
        (source / path.name).write_bytes(path.read_bytes())
    settings = CleanConfig(source, out, near_copies=None)
    first = clean(settings)
    (source / "0.jsonl").write_text("".join((source / "0.jsonl").read_text().splitlines(keepends=True)[:-5]))
    assert clean(settings)[0].texts_in == first[0].texts_in - 5
    alone = clean(dataclasses.replace(settings, repeats=None, rules=RulesConfig(min_words=150)))
    assert [one.stage for one in alone] == ["rules"] and alone[0].dropped["length"] > first[0].dropped["length"]
    assert lines(out / "corpus") == lines(out / "1-rules")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a', "line 3 is not a line of JSON"),
        (b'{"txt": "a"}', "line 3 has no text in 'text'"),
        (b'{"text": 3}', "line 3 has no text in 'text'"),
        (b'["a"]', "line 3 has no text in 'text'"),
        (b'{"text": "\xff"}', "line 3 is not a line of JSON"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_written(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=message):
        clean(CleanConfig(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_sources_and_settings_that_do_not_fit(tmp_path):
    for settings, message in (
        ({}, "has no .jsonl files"),
        ({"source": tmp_path / "none.jsonl"}, "cannot read"),
        ({"source": tmp_path, "quality": QualityConfig(tmp_path / "none.jsonl")}, "no such file: quality.reference"),
        ({"rules": None, "near_copies": None, "repeats": None}, "every stage is null"),
    ):
        if "no such" in message or "every" in message:
            (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
        with pytest.raises(InputError, match=message):
            clean(CleanConfig(**{"source": tmp_path, "out": tmp_path / "out", **settings}))
        (tmp_path / "a.jsonl").unlink(missing_ok=True)


def test_the_command(raw, tmp_path, capsys):
    clean_corpus.main(["--source", str(raw), "--out", str(tmp_path / "out"), "--near_copies.bands", "5"])
    assert "| rules | 90 |" in capsys.readouterr().out
    assert "| rules | 90 |" in (tmp_path / "out" / "counts.md").read_text()
