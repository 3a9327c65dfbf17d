"""Tables on a tiny model: measured once, kept, resumed; one run per folder; figures that add up."""

import csv
import json
import re

import numpy as np
import pytest
from filelock import FileLock

from experiments import cells, method_table, reproduce
from experiments.cells import Cell, total
from experiments.tables import measures_of
from experiments.timed import SharedPrompts
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder

TABLE = """
table: tiny
rows:
  - {name: plain}
  - {name: copies, method: prompt_lookup, options: {length: 3}, paper: "1.75"}
  - {name: recycled, method: token_recycling, options: {width: 6}}
claims:
  - {text: Copies are accepted, row: copies}
presets:
  smoke: {per_task: 1, max_new_tokens: 12}
"""
QUESTIONS = [("qa", ["abcabcabc"]), ("coding", ["hello", "again"])]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Returns a function that runs the main in a folder of its own, and the results folder."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "table.yaml").write_text(TABLE)
    lines = [json.dumps({"question_id": i, "category": c, "turns": t}) for i, (c, t) in enumerate(QUESTIONS)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    flags = ["--preset", "smoke", "--model", str(tmp_path / "model"), "--out", str(out)]
    flags += ["--questions", str(tmp_path / "questions.jsonl")]
    return lambda *more: reproduce.main([str(tmp_path / "table.yaml"), *flags, *more]), out


def kept(capsys) -> list[bool]:
    return [line.endswith("(kept)") for line in capsys.readouterr().out.splitlines() if re.match(r" *\d+/\d+ ", line)]


def test_a_table_is_written_and_kept(table, capsys):
    run, out = table
    run()
    assert kept(capsys) == [False] * 6
    assert {path.name for path in out.iterdir()} >= {"table.md", "table.csv", "plot.png", "config.yaml", "runs"}
    page = (out / "table.md").read_text()
    assert "| copies |" in page and "reproduced** here" in page and "jax " in page
    with (out / "table.csv").open() as file:
        figures = {(r["row"], r["task"], r["measure"]): float(r["value"]) for r in csv.DictReader(file)}
    assert figures["plain", "all", "mat"] == pytest.approx(figures["plain", "qa", "speedup"]) == 1
    assert figures["plain", "all", "new_tokens"] == 36, "three turns"
    assert {figures[row, "all", "same"] for row in ("copies", "recycled")} == {1}, "exact methods write plain text"
    run()
    assert kept(capsys) == [True] * 6
    run("--seed", "3")
    assert kept(capsys) == [False] * 6, "another seed is another measurement"


def test_a_preset_chooses_rows(table, tmp_path, capsys):
    run, out = table
    (tmp_path / "table.yaml").write_text(TABLE.replace("12}", "12, rows: [recycled]}"))
    run()
    assert kept(capsys) == [False] * 4
    page = (out / "table.md").read_text()
    assert "| recycled |" in page and "| copies |" not in page and "**not measured** here" in page
    (tmp_path / "table.yaml").write_text(TABLE)
    run()
    assert kept(capsys) == [False, False, True] * 2, "what was measured stays; plain decoding is of the new cells' run"
    new, old = (json.loads((out / "runs" / f"qa--{row}.json").read_text()) for row in ("copies", "recycled"))
    plain = json.loads((out / "runs" / "qa--plain.json").read_text())
    assert new["plain_decode_seconds"] == plain["decode_seconds"] != old["plain_decode_seconds"]
    assert plain["machine"] in page


def test_an_interrupted_run_goes_on(table, capsys, monkeypatch):
    run, out = table
    save, saved = cells.save_cell, []

    def stopping(path, cell, warm):
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append((path, cell, warm))
        save(path, cell, warm)

    monkeypatch.setattr(method_table, "save_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (out / "table.md").exists()
    monkeypatch.setattr(method_table, "save_cell", save)
    capsys.readouterr()
    run()
    assert kept(capsys) == [True] * 3 + [False] * 3
    resumed = json.loads((out / "runs" / "qa--recycled.json").read_text())
    for path in (out / "runs").iterdir():
        path.unlink()
    run()
    whole = json.loads((out / "runs" / "qa--recycled.json").read_text())
    assert resumed["steps"] == whole["steps"], "the table that the first cell left was taken up again"


CORPUS = """
table: corpus
rows:
  - {name: plain}
  - {name: cold, method: aded, options: &small {slots: 4096, iterations: 5, sentences: 4}}
  - {name: warm, method: aded, options: *small, corpus: 2}
presets:
  smoke: {per_task: 1, max_new_tokens: 12, tasks: [qa]}
"""


def test_a_row_can_start_from_replies_to_what_is_not_asked(table, tmp_path, capsys):
    run, out = table
    (tmp_path / "table.yaml").write_text(CORPUS)
    with pytest.raises(InputError, match="every question of .* is asked"):
        run("--presets.smoke.tasks", "qa", "multi-turn")
    run()
    shown = capsys.readouterr().out
    assert re.search(r"^\d+ tokens in 1 replies", shown, re.MULTILINE), "one question is asked, one is left"
    figures = {row: json.loads((out / "runs" / f"qa--{row}.json").read_text()) for row in ("plain", "cold", "warm")}
    assert figures["plain"]["tokens"] == figures["cold"]["tokens"] == figures["warm"]["tokens"]
    tables = {row: np.load(out / "runs" / f"qa--{row}.npz") for row in ("cold", "warm")}
    known = {row: int((table[table.files[0]][:, 0] >= 0).sum()) for row, table in tables.items()}
    assert known["warm"] > known["cold"], "pairs that only the other question's reply has"
    questions = tmp_path / "questions.jsonl"
    questions.write_text(questions.read_text().replace("hello", "good day"))
    run()
    assert kept(capsys) == [False, True, False], "another corpus is another measurement"


GENERATED = """
table: generated
generate: [words, needle]
rows:
  - {name: plain}
  - {name: shortened, retrieval: {tokens: 128, reader: both}}
  - {name: drafted, method: rapid, draft: true, options: {mode: sd, length: 2}, retrieval: {tokens: 128}}
claims:
  - {text: The whole document helps, row: plain, than: shortened, measure: correct, factor: 0.5}
presets:
  smoke: {per_task: 1, max_new_tokens: 6, document_words: 60}
"""


def test_tables_of_generated_questions_score_answers(table, tmp_path, monkeypatch):
    """A reply is made right by hand: a model this small finds no answers."""
    run, out = table
    longer = str(write_tiny_folder(tmp_path / "longer", max_length=1024))
    (tmp_path / "table.yaml").write_text(GENERATED)
    monkeypatch.setattr(cells, "is_correct", lambda reply, answer: answer.isdigit())
    decode, read = cells.Row._decode, []

    def reading(row, prompt, seed, call):
        read.append((prompt, call.get("draft_prompts")))
        return decode(row, prompt, seed, call)

    monkeypatch.setattr(cells.Row, "_decode", reading)
    run("--model", longer, "--draft", longer)
    with (out / "table.csv").open() as file:
        figures = {(r["row"], r["task"], r["measure"]): float(r["value"]) for r in csv.DictReader(file)}
    assert figures["plain", "words", "correct"] == 0 and figures["plain", "needle", "correct"] == 1
    assert figures["shortened", "all", "correct"] == 0.5
    assert figures["drafted", "all", "same"] == 1
    whole, short, drafted = read[3:]
    assert len(short[0]) < len(whole[0]) / 2 and drafted[0] == whole[0] and drafted[1] == [short[0]]
    assert figures["drafted", "words", "mat"] == 3, "where there is no document, the draft reads what the target reads"
    page = (out / "table.md").read_text()
    assert "Share of right answers" not in page, "it tells no row from another"
    assert "right answers |" in page and "to be above 0.5 times it" in page and "written by code" in page


def test_two_runs_in_one_folder_are_refused(table):
    run, out = table
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(InputError, match="another run is writing to"):
        run()


def test_tables_that_cannot_be(table, tmp_path):
    run, _ = table
    for text, message in (
        ("rows: [{name: mine}]", "the first row must be called plain"),
        ("rows: [{name: plain}, {name: plain}]", "names of their own"),
        ("claims: [{text: x, row: none}]", "must compare rows of this table"),
        ("presets: {smoke: {tasks: [quiz]}}", "quiz"),
        ("presets: {smoke: {per_task: 0}}", "at least 1"),
        ("presets: {smoke: {rows: [fast]}}", "must choose among the rows"),
        ("rows: [{name: plain}, {name: b, method: rsd_c, draft: true}]", "name it in draft"),
        ("rows: [{name: plain}, {name: b, metod: rsd_c}]", "method"),
        ("rows: [{name: plain}, {name: b, method: prompt_lookup, corpus: 3}]", "only for aded"),
    ):
        (tmp_path / "table.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            run()


def cell(tokens: list[list[int]], steps: int, seconds: float) -> Cell:
    return Cell("", tokens, steps, steps, 0, 3 * steps, 2, [0, steps], 1.0, seconds)


def test_figures():
    plain, fast = cell([[1, 2, 3, 4], [5, 6]], 6, 5.0), cell([[1, 2, 3, 4], [5, 7]], 3, 3.0)
    figures = measures_of(fast.beside(plain), plain)
    assert figures["mat"] == 2 and figures["same"] == 0.5 and figures["speedup"] == pytest.approx(6 / 4)
    assert figures["break_even"] == pytest.approx((3 / 3) / (5 / 6))
    both = total([plain, fast])
    assert both.emitted == 12 and both.steps == 9 and both.histogram == [0, 9] and both.decode_seconds == 8.0


LONG = """
table: long
generate: [needle, key_value]
long_prompts: true
rows:
  - {name: plain}
  - {name: tidal, method: tidal, options: {budget: 16, select: [0]}}
  - {name: paged, method: lserve, options: {budget: 48, page: 16, gates: measured, sink: 8, local: 24}}
  - {name: random, method: lserve, options: {budget: 48, page: 16, gates: 1, sink: 8, local: 24}}
  - {name: everything, method: streaming, options: {sink: 1000, local: 1000}}
claims:
  - {text: A dense step is slower, row: plain, than: tidal, measure: break_even, factor: 0.001}
presets:
  smoke: {per_task: 2, max_new_tokens: 5, document_words: 60}
"""


def test_long_prompts_are_read_once_for_all_rows(table, tmp_path, monkeypatch, capsys):
    run, out = table
    longer = str(write_tiny_folder(tmp_path / "longer", max_length=1024))
    (tmp_path / "table.yaml").write_text(LONG)
    begun, slots, read = [], set(), SharedPrompts.__call__

    def counted(shared, decode_fn, params, prompts):
        begun.append(len(shared._kept))
        slots.add((prompts.tokens.shape[1], decode_fn.plan.cache_slots))
        return read(shared, decode_fn, params, prompts)

    monkeypatch.setattr(SharedPrompts, "__call__", counted)
    run("--model", longer)
    assert max(begun) == 2 and begun.count(0) == 2, "two questions of two tasks"
    assert len({cache for _, cache in slots}) == 2, "caches of each task's own size"
    cells = {path.stem: json.loads(path.read_text()) for path in (out / "runs").glob("*.json")}
    for task in ("needle", "key_value"):
        plain = cells[f"{task}--plain"]
        assert cells[f"{task}--everything"]["tokens"] == plain["tokens"]
        for row in ("tidal", "paged", "random", "everything"):
            assert cells[f"{task}--{row}"]["prefill_seconds"] == pytest.approx(plain["prefill_seconds"], abs=0.1)
    assert "A dense step is slower: **reproduced** here" in (out / "table.md").read_text()
    (tmp_path / "table.yaml").write_text(LONG.replace("long_prompts: true", "long_prompts: false"))
    monkeypatch.setattr(SharedPrompts, "__call__", None)
    run("--model", longer)
    for name, cell in cells.items():
        alone = json.loads((out / "runs" / f"{name}.json").read_text())
        assert alone["tokens"] == cell["tokens"] and alone["key"] != cell["key"]
