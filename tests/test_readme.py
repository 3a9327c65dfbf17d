"""README names methods, adapters and tables once each, and only files and modules that there are."""

import importlib.util
import re
from pathlib import Path

from decoding import METHODS
from finetune.adapters import ADAPTERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def listed(start: str) -> list[str]:
    """Returns the names in code at the beginning of rows or items, up to what says something of them."""
    lines = [line for line in README.splitlines() if line.startswith(start + " `")]
    return [
        name for line in lines for name in re.findall(r"`([^`]+)`", re.split(r" \||: ", line.removeprefix(start))[0])
    ]


def test_methods_and_adapters_are_listed_once():
    rows = listed("|")
    assert {name: rows.count(name) for name in (*METHODS, *ADAPTERS)} == dict.fromkeys((*METHODS, *ADAPTERS), 1)


def test_tables_are_listed_once():
    assert sorted(listed("-")) == sorted(path.stem for path in (ROOT / "configs" / "tables").glob("*.yaml"))


def test_what_is_named_exists():
    files = re.findall(r"\b(?:configs|models|decoding|finetune|experiments)/[\w/]+\.(?:yaml|py|ipynb)", README)
    modules = re.findall(r"python -m (experiments\.\w+|models[\w.]*\w)", README)
    assert len(files) > 20 and not [file for file in files if not (ROOT / file).is_file()]
    assert len(modules) > 20 and not [name for name in modules if importlib.util.find_spec(name) is None]
