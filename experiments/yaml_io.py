"""YAML in and out, without the traps of YAML 1.1.

Scalars follow the core schema of YAML 1.2, which is what people expect: `3e-4` is a float, only `true` and `false` are
booleans, and `no`, `on`, `1:30`, `010` and `2024-01-01` are text. A key given twice in one map is an error, as are keys
that are not text and tags beyond the plain types. What `dump_yaml` writes, `read_yaml` reads back as equal values.
"""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from models.errors import InputError

_TAG = "tag:yaml.org,2002:"
_DIGITS = r"[0-9][0-9_]*"
# Tag -> (what a plain scalar of this type looks like, its possible first characters). Anything else is text.
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "float": (
        rf"[-+]?({_DIGITS}\.[0-9]*|\.[0-9]+|{_DIGITS}(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_PLAIN_TAGS = {_TAG + name for name in (*_SCALARS, "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that knows only the scalar types of `_SCALARS`."""

    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """`SafeDumper` that also quotes text which `_Loader`, or any YAML 1.1 reader, would take for another type."""


for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Puts text with rare line breaks (NEL, LS, PS) in double quotes, the one style that escapes them."""
    return dumper.represent_scalar(_TAG + "str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None)


_Dumper.add_representer(str, _represent_text)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a YAML file whose top level is a map; an empty file is an empty map.

    Returns:
        The values, and where each of them is written: dotted path ("train.steps", "rows[0].name") -> "FILE:LINE", and
        "" -> "FILE".

    Raises:
        InputError: the file is missing, unreadable or not valid YAML, or breaks one of the rules above.
    """
    text = _read_text(path)
    places: dict[str, str] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {"": str(path)}
        _check(node, "", str(path), places)
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {problem or error}.") from None
    except RecursionError:
        raise InputError(f"{path}: maps and lists are nested too deeply, or contain themselves.") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: the file must be a map of config keys (`key: value` lines), got {data!r}.")
    return data, places | {"": str(path)}


def parse_value(text: str) -> Any:
    """Reads one value of a free-form option: a scalar by the same rules as in a file, or a list written [1, 2].

    Raises:
        InputError: the text starts a list that is not valid YAML.
    """
    try:
        if text.startswith("["):
            return yaml.load(text, _Loader)
        loader = _Loader("")
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    except yaml.YAMLError:
        raise InputError(f"{text!r} is not a list. Write it as [1, 2, 3], in quotes for the shell.") from None


def dump_yaml(data: Any) -> str:
    """Writes maps, lists and scalars as YAML, keys in their own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_text(path: Path) -> str:
    """Returns a file's text; a missing file's error names the files that have almost that name."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = sorted(Path("configs").rglob("*.yaml"))
        close = difflib.get_close_matches(path.stem, {file.stem for file in shipped}, n=3, cutoff=0.6)
        near = ", ".join(str(file) for file in shipped if file.stem in close)
        raise InputError(f"there is no config file {path}.{f' Did you mean {near}?' if near else ''}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8.") from None
    except OSError as error:
        raise InputError(f"cannot read the config file {path}: {error.strerror}.") from None


def _check(node: yaml.Node, path: str, file: str, places: dict[str, str]) -> None:
    """Notes in `places` the line of every value; refuses odd tags, duplicate keys and keys that are not text."""
    line = places.setdefault(path, f"{file}:{node.start_mark.line + 1}")
    if node.tag not in _PLAIN_TAGS:
        raise InputError(f"{line}: the tag {node.tag.replace(_TAG, '!!')!r} is not supported. Write a plain value.")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check(item, f"{path}[{index}]", file, places)
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, value in node.value:
            line = f"{file}:{key.start_mark.line + 1}"
            if key.tag != _TAG + "str":
                seen = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a map"
                raise InputError(f"{line}: a config key must be text, got {seen}. Put it in quotes.")
            child = f"{path}.{key.value}" if path else key.value
            if key.value in names:
                first = places[child].rpartition(":")[2]
                raise InputError(f"{line}: duplicate config key {child!r}, already set on line {first}. Keep one.")
            names.add(key.value)
            places[child] = line
            _check(value, child, file, places)
