"""Typed configs for every main: dataclass defaults, then a YAML file, then the command line.

A config is a frozen dataclass whose fields all have defaults: scalars, `Literal`, `Optional`, tuples, dataclasses,
unions of dataclasses told apart by a field `type: Literal["..."]`, tuples of these, and `dict[str, ...]` of scalars and
lists for free-form options. A field's comment or docstring is its help text; a rule beyond the type is a ValueError in
`__post_init__`.

Layers, later ones on top: the defaults, the file's `base:` (one level, relative to the file), the file, the flags.
Maps merge key by key; lists and scalars replace. A map whose `type` differs from the one below replaces it as well: the
fields of one choice mean nothing to another. The resolved config, written by `save_config`, starts the same run again.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar

from experiments.command_line import Flag, parse_flags, split_flags, take_config_path
from experiments.schema import build, by_type, dataclasses_in, is_free_form, item_type, parts
from experiments.yaml_io import dump_yaml, parse_value, read_yaml
from models.errors import InputError
from models.weights.whole import whole_file

T = TypeVar("T")
_COMMAND_LINE = "command line"


def load_config(cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str) -> T:
    """Returns the config that the command line asks for.

    Args:
        cls: the config's dataclass; `cls()` gives the defaults.
        argv: the arguments after the program's name; None means those of this process.
        prog: the program as the user starts it, for the help page: "python -m experiments.train".
        description: what the program does, for the help page.

    Raises:
        InputError: a file, key or value is wrong; the message starts with FILE:LINE and names the dotted key.
        SystemExit: with code 2 after a message on stderr for a wrong flag, with code 0 after `--help`.
    """
    path, flags = take_config_path(split_flags(sys.argv[1:] if argv is None else argv))
    data, places = _plain(cls()), {"": _COMMAND_LINE}
    if path:
        layer, places = _read_with_base(path)
        data = _merge(data, layer)
    for flag in flags:
        if flag.name.endswith(".type") and len(flag.values) == 1:
            data = _override(data, flag.name.split("."), flag.values[0])
            places[flag.name] = _COMMAND_LINE
    config = build(cls, data, "", places)

    fields = list(parts(config))
    sections = tuple(f"{name}." for name, hint in fields if is_free_form(hint))
    for flag in flags:
        if flag.name.startswith(sections):
            data = _set_option(data, flag, sections, places)
    return parse_flags(
        build(cls, data, "", places),
        [flag for flag in flags if not flag.name.startswith(sections)],
        repeatable={name for name, hint in fields if item_type(hint) is not None},
        members={name: list(by_type(union)) for name, hint in fields if len(union := dataclasses_in(hint)) > 1},
        prog=prog,
        description=description,
    )


def chosen_type(argv: Sequence[str]) -> str | None:
    """Returns the `type` that a command line or its file asks for, for a main with several kinds of config."""
    path, flags = take_config_path(split_flags(argv))
    given = [value for flag in flags if flag.name == "type" for value in flag.values]
    if given:
        return given[-1]
    return _read_with_base(path)[0].get("type") if path else None


def dump_config(config: Any) -> str:
    """Returns a config as YAML, fields in their order and tuples as lists; loading it gives an equal config."""
    return dump_yaml(_plain(config))


def save_page(config: Any, text: str) -> None:
    """Writes a measurement's page, table.md, and the config that it was made with into the folder `config.out`.

    Raises:
        InputError: the config cannot be written.
    """
    save_config(config, config.out / "config.yaml")
    with whole_file(config.out / "table.md") as partial:
        partial.write_text(text, encoding="utf-8")


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Writes `dump_config(config)` to a file and makes its folder; the file is whole or not there at all.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    try:
        with whole_file(path) as partial:
            partial.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the config to {path}: {error.strerror}.") from None


def _plain(value: Any) -> Any:
    """Returns a config as the maps, lists and scalars that YAML knows."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value


def _read_with_base(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a file's values over those of its base, and where each is written (`read_yaml`)."""
    data, places = read_yaml(path)
    if "base" not in data:
        return data, places
    base = data.pop("base")
    if not isinstance(base, str):
        raise InputError(f"{places['base']}: `base` must be the path of another YAML file, got {base!r}.")
    below, below_places = read_yaml(path.parent / base)
    if "base" in below:
        raise InputError(f"{below_places['base']}: the base of {path} has a base of its own. One level is allowed.")
    return _merge(below, data), below_places | places


def _merge(below: Any, above: Any) -> Any:
    """Lays one layer over another: maps key by key, unless both name a `type` and the types differ."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "type" in below and above.get("type", below["type"]) != below["type"]:
        return above
    return below | {key: _merge(below.get(key), value) for key, value in above.items()}


def _override(data: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Returns data with one value set; a path that does not lead through maps changes nothing, tyro will refuse it."""
    node: Any = data
    for key in keys[:-1]:
        if not isinstance(node, dict) or key not in node:
            return data
        node = node[key]
    if node is not None and not isinstance(node, dict):
        return data
    for key in reversed(keys):
        value = {key: value}
    return _merge(data, value)


def _set_option(data: dict[str, Any], flag: Flag, sections: Sequence[str], places: dict[str, str]) -> dict[str, Any]:
    """Returns data with the value of `--SECTION.KEY VALUE...` set in a free-form map; several values make a list."""
    section = next(name for name in sections if flag.name.startswith(name))
    key = flag.tokens[0].partition("=")[0].removeprefix("--")[len(section) :]
    values = [parse_value(value) for value in flag.values]
    if not key or not values:
        raise InputError(f"{flag.tokens[0]}: wanted a key and a value, as in --{section}KEY VALUE.")
    places[section + key] = _COMMAND_LINE
    return _override(data, [*section[:-1].split("."), key], values[0] if len(values) == 1 else values)
