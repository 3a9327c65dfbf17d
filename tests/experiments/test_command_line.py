"""Flags as groups of tokens, and what the parser makes of them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.command_line import Flag, parse_flags, split_flags, take_config_path
from models.errors import InputError


@dataclass(frozen=True)
class Config:
    size: int = 1
    names: tuple[str, ...] = ("x",)
    options: dict[str, int] | None = None


def parse(*argv: str) -> Config:
    return parse_flags(
        Config(),
        split_flags(argv),
        repeatable={"names"},
        members={"method": ["a", "b"]},
        prog="sample",
        description="Does.",
    )


def test_flags_are_split_with_their_values():
    flags = split_flags(["stray", "--a-b.c", "1", "-2", "--d=x=y", "z", "-h", "--", "- x", "--1"])
    assert [(flag.name, flag.values) for flag in flags] == [
        ("", []),
        ("a_b.c", ["1", "-2"]),
        ("d", ["x=y", "z"]),
        ("", ["--", "- x", "--1"]),
    ]
    assert [token for flag in flags for token in flag.tokens][0] == "stray"


def test_a_value_may_have_several_lines():
    assert split_flags(["--a=b\nc"]) == [Flag("a", ("--a=b\nc",))]
    assert split_flags(["--a=b\nc"])[0].values == ["b\nc"]


def test_config_path_is_taken_out():
    path, rest = take_config_path(split_flags(["--size", "2", "--config", "a.yaml", "-h"]))
    assert path == Path("a.yaml")
    assert [flag.tokens for flag in rest] == [("--size", "2"), ("-h",)]
    assert take_config_path(split_flags(["--size", "2"]))[0] is None


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "a", "b"], ["--config=a", "--config=b"]])
def test_config_path_must_be_one(argv):
    with pytest.raises(InputError, match="--config takes one YAML file"):
        take_config_path(split_flags(argv))


def test_values_are_laid_over_the_config():
    assert parse() == Config()
    assert parse("--size", "3", "--names", "a", "--names=b", "c") == Config(3, ("a", "b", "c"))
    assert parse("--names") == Config(names=())


def test_help_names_the_members_of_unions(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    text = capsys.readouterr().out
    assert "usage: sample" in text and "--method.type is one of: a, b." in text and "--options .KEY VALUE" in text
