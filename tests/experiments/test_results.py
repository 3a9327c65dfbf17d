"""RESULTS.md from saved runs: which tables it takes up, and how."""

import sys

import pytest

from experiments import results
from experiments.config import load_config, save_config
from experiments.method_table import TableConfig
from models.errors import InputError


@pytest.fixture
def saved(tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    for table in ("one", "two", "never_run"):
        (tmp_path / "tables" / f"{table}.yaml").write_text("")
    for table, preset in (
        ("one", "cpu"),
        ("two", "cpu"),
        ("two", "smoke"),
        ("speculation_bench", "cpu"),
        ("old", "cpu"),
    ):
        folder = tmp_path / "results" / table / preset
        folder.mkdir(parents=True)
        (folder / "table.md").write_text(f"# Title of {table}\n\nMeasured.\n\n## {preset} figures\n\n| a |\n")
    monkeypatch.chdir(tmp_path)
    flags = ["--results", "results", "--tables", "tables"]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["results", *flags, *more])
        results.main()
        return (tmp_path / "RESULTS.md").read_text()

    return run


def test_every_table_that_was_run_is_taken_up_in_order(saved):
    page = saved()
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["## Title of speculation_bench", "## Title of one", "## Title of two"]
    assert page.count("### cpu figures") == 3 and "smoke" not in page
    assert "`python -m experiments.reproduce tables/two.yaml --preset cpu`" in page
    assert page.startswith("# Results\n") and saved() == page


def test_the_page_begins_with_what_holds(saved, tmp_path):
    answers = "- a: **reproduced** here\n- b: **not reproduced** here\n- c: **reproduced** here\n"
    (tmp_path / "results" / "two" / "cpu" / "table.md").write_text(f"# Title of two\n\nMeasured.\n\n{answers}")
    page = saved()
    assert "| Title of one |  |  |  |\n| Title of two | 2 | 0 | 1 |\n\n## " in page and saved() == page


def test_another_preset(saved):
    page = saved("--preset", "smoke")
    assert "Title of two" in page and "Title of one" not in page and "smoke figures" in page


def test_a_section_stays_where_nothing_was_run_here(saved, tmp_path):
    """Its flags with it; one of a table that is no longer shipped goes, and one that was run anew is written anew."""
    before = saved()
    assert "## Title of two" in before
    flagged = before.replace("tables/two.yaml --preset cpu`", "tables/two.yaml --preset cpu --seed 3`")
    gone = "\n## Gone\n\n`python -m experiments.reproduce tables/gone.yaml --preset cpu`\n\nold\n"
    (tmp_path / "RESULTS.md").write_text(flagged + gone)
    (tmp_path / "results" / "two" / "cpu" / "table.md").unlink()
    (tmp_path / "results" / "one" / "cpu" / "table.md").write_text("# Title of one\n\nMeasured anew.\n")
    after = saved()
    assert "--seed 3`\n\nMeasured.\n\n### cpu figures" in after and "Gone" not in after
    assert "Measured anew." in after and after.count("## Title of one") == 1 and saved() == after


def test_nothing_to_take_up(saved, tmp_path):
    with pytest.raises(InputError, match="no table has been run with preset gpu"):
        saved("--preset", "gpu")
    assert not (tmp_path / "RESULTS.md").exists()


def test_a_run_with_other_settings_is_shown_with_its_flags(saved, tmp_path):
    """Of a shipped table whose saved run was another one's size, on a file of the reader's own."""
    (tmp_path / "tables" / "one.yaml").write_text("table: one\npresets: {cpu: {per_task: 2}}\n")
    argv = ["--config", "tables/one.yaml", "--presets.cpu.per_task", "5", "--questions", "/somewhere/question.jsonl"]
    argv += ["--presets.gpu.per_task", "7"]  # which this run did not read
    config = load_config(TableConfig, argv, prog="test", description="")
    save_config(config, tmp_path / "results" / "one" / "cpu" / "config.yaml")
    assert "one.yaml --preset cpu --questions question.jsonl --presets.cpu.per_task 5`" in saved()
