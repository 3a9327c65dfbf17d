"""YAML files: scalar rules, refused traps, lines of values, and messages of unreadable files."""

import math

import pytest
import yaml

from experiments.yaml_io import dump_yaml, parse_value, read_yaml
from models.errors import InputError


def read(tmp_path, text: str):
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


def message(tmp_path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    return str(caught.value).replace(str(tmp_path), "")


SCALARS = [
    ("3e-4", 3e-4), ("1e5", 1e5), ("1.5E+3", 1500.0), ("-.5", -0.5), ("1.", 1.0), (".inf", math.inf),
    ("-.inf", -math.inf),
    ("3", 3), ("-3", -3), ("+3", 3), ("0", 0), ("1_000", 1000),
    ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("1:30", "1:30"), ("010", "010"), ("0x10", "0x10"),
    ("2024-01-01", "2024-01-01"), ("e5", "e5"), ("-", "-"), (".", "."), ("'3'", "3"), ("=", "="),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars(text, value, tmp_path):
    if text == "-":  # alone it starts a list
        text = "'-'"
    seen = read(tmp_path, f"k: {text}\n")[0]["k"]
    assert seen == value and type(seen) is type(value)


@pytest.mark.parametrize(("text", "value"), [pair for pair in SCALARS if "'" not in pair[0]])
def test_values_on_the_command_line_follow_the_same_rules(text, value):
    seen = parse_value(text)
    assert seen == value and type(seen) is type(value)


def test_lists_and_plain_text_on_the_command_line():
    assert parse_value("[1, 3e-4, [a]]") == [1, 3e-4, ["a"]]
    assert parse_value("a: b # {c") == "a: b # {c"
    with pytest.raises(InputError, match="is not a list"):
        parse_value("[1")


def test_nan_loads(tmp_path):
    assert math.isnan(read(tmp_path, "k: .nan\n")[0]["k"])


TEXTS = [text for text, _ in SCALARS]
TEXTS += ["3\n", " x ", "- x", "# x", "a: b", "é🙂", "'", '"', "[1]", "{", "&a", "*a", "!x", "|", "y", "<<"]
TEXTS += ["a\x85b", "\u2028", "a\u2029", "a\rb", "\t", "\ufeff", "\x00"]


@pytest.mark.parametrize("reader", ["ours", "yaml 1.1"])
def test_what_is_dumped_loads_equal(reader, tmp_path):
    data = {text: text for text in TEXTS}
    data |= {"f": [1e-7, 1e300, 0.1, -0.0, math.inf], "i": 10**20, "b": True, "n": None, "m": {}}
    text = dump_yaml(data)
    again = read(tmp_path, text)[0] if reader == "ours" else yaml.safe_load(text)
    assert again == data and repr(again) == repr(data)
    assert list(again) == list(data)


def test_lines_of_values(tmp_path):
    _, places = read(tmp_path, "# comment\ntrain:\n  steps: 3\nrows:\n- name: a\n- name: b\n")
    path = str(tmp_path / "a.yaml")
    assert places[""] == path
    wanted = {"train": 2, "train.steps": 3, "rows": 4, "rows[0].name": 5, "rows[1]": 6, "rows[1].name": 6}
    assert {key: places[key] for key in wanted} == {key: f"{path}:{line}" for key, line in wanted.items()}


def test_empty_files_are_empty_maps(tmp_path):
    assert read(tmp_path, "")[0] == read(tmp_path, "# only a comment\n")[0] == {}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: [1\n", "/a.yaml:3: not valid YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "/a.yaml:2: not valid YAML: found character '\\t'"),
        ("a: *x\n", "/a.yaml:1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "/a.yaml:2: not valid YAML"),
        ("a: '\x01'\n", "/a.yaml: not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "/a.yaml:3: duplicate config key 'a', already set on line 1."),
        ("t:\n  s: {x: 1, x: 1}\n", "/a.yaml:2: duplicate config key 't.s.x', already set on line 2."),
        ("l:\n- {x: 1,\n   x: 2}\n", "/a.yaml:3: duplicate config key 'l[0].x', already set on line 2."),
        ("1: a\n", "/a.yaml:1: a config key must be text, got '1'."),
        ("true: a\n", "/a.yaml:1: a config key must be text, got 'true'."),
        ("? [a]\n: b\n", "/a.yaml:1: a config key must be text, got a list or a map."),
        ("a: !!python/object:os.system x\n", "/a.yaml:1: the tag '!!python/object:os.system' is not supported."),
        ("a: !!timestamp 2024-01-01\n", "/a.yaml:1: the tag '!!timestamp' is not supported."),
        ("- 1\n", "/a.yaml: the file must be a map"),
        ("text\n", "/a.yaml: the file must be a map"),
        ("a: &a [*a]\n", "/a.yaml: maps and lists are nested too deeply, or contain themselves."),
    ],
)
def test_refused_files(text, wanted, tmp_path):
    assert message(tmp_path, text).startswith(wanted)


def test_missing_file_names_path_and_near_matches(tmp_path, monkeypatch):
    (tmp_path / "configs" / "decode").mkdir(parents=True)
    (tmp_path / "configs" / "decode" / "token_recycling.yaml").write_text("")
    (tmp_path / "configs" / "demo.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        read_yaml(tmp_path / "tokenrecycling.yml")
    near = "configs/decode/token_recycling.yaml"
    assert str(caught.value) == f"there is no config file {tmp_path}/tokenrecycling.yml. Did you mean {near}?"
    with pytest.raises(InputError, match=r"there is no config file .*/nope.yaml\.$"):
        read_yaml(tmp_path / "nope.yaml")


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a text file in UTF-8"):
        read_yaml(tmp_path / "b.yaml")
