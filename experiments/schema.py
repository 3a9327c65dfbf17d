"""From plain data to typed configs: what a config's annotations allow, and the error when data does not fit.

`build` walks dataclasses, unions told apart by `type`, tuples and maps, so that every error knows its dotted path; the
values in them go through pydantic in strict mode: "32" and true are no integers, 3 is a float.
`Places` maps a dotted path ("train.steps", "rows[0].name", "" for the whole) to where it was written ("FILE:LINE").
"""

import dataclasses
import functools
import json
import reprlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from models.errors import InputError, unknown_name

T = TypeVar("T")
Places = Mapping[str, str]
_adapter = functools.cache(TypeAdapter)


def build(hint: Any, value: Any, path: str, places: Places) -> Any:
    """Returns plain data as a value of a type.

    Args:
        hint: a dataclass, or the type of one of its fields.
        value: maps, lists and scalars as YAML has them.
        path: the dotted path of the value, "" for a whole config.
        places: where each value was written; must have "".

    Raises:
        InputError: an unknown or missing key, a wrong type, an unknown `type`, or a ValueError of a `__post_init__`;
            the message gives place, path, the value seen and what was wanted.
    """
    single, classes = _without_none(hint), dataclasses_in(hint)
    if isinstance(value, list) and (item_hint := item_type(hint)) is not None:
        items = (build(item_hint, item, f"{path}[{index}]", places) for index, item in enumerate(value))
        return get_origin(single)(items)
    if isinstance(value, dict) and get_origin(single) is dict:
        return {key: build(get_args(single)[1], item, f"{path}.{key}", places) for key, item in value.items()}
    if isinstance(value, dict) and classes:
        cls = classes[0] if len(classes) == 1 else _choose(classes, value, path, places)
        return _build_class(cls, value, path, places)
    if classes and not (value is None and types.NoneType in _members(hint)):
        keys = "type" if len(classes) > 1 else ", ".join(field.name for field in dataclasses.fields(classes[0]))
        raise _error(places, path, f"config key {path!r}: wanted a map with keys ({keys}), got {reprlib.repr(value)}.")
    try:
        return _adapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
        seen = f"{reprlib.repr(value)} ({type(value).__name__})"
        raise _error(places, path, f"config key {path!r}: wanted {wanted}, got {seen}.") from None


def parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and type of every field of a config, a section before the fields in it."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        yield prefix + field.name, hints[field.name]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from parts(value, f"{prefix}{field.name}.")


def dataclasses_in(hint: Any) -> list[type]:
    """Returns the dataclasses that a value of this type may be, [] for a plain type."""
    return [member for member in _members(hint) if dataclasses.is_dataclass(member)]


def by_type(classes: list[type]) -> dict[str, type]:
    """Returns the members of a union of dataclasses by the value of their field `type`."""
    return {get_args(get_type_hints(cls)["type"])[0]: cls for cls in classes}


def item_type(hint: Any) -> Any:
    """Returns T for `tuple[T, ...]` and `list[T]`, also under `| None`; None for any other type."""
    hint = _without_none(hint)
    origin, args = get_origin(hint), get_args(hint)
    return args[0] if origin is list or (origin is tuple and args[1:] == (...,)) else None


def is_free_form(hint: Any) -> bool:
    """Whether a type is a map, or None, of plain values whose keys no class knows."""
    hint = _without_none(hint)
    return get_origin(hint) is dict and not dataclasses_in(get_args(hint)[1])


def _members(hint: Any) -> tuple[Any, ...]:
    """Returns the members of a union; any other type is its own only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _without_none(hint: Any) -> Any:
    """Returns T for `T | None`, any other type as it is."""
    members = [member for member in _members(hint) if member is not types.NoneType]
    return members[0] if len(members) == 1 else hint


def _choose(classes: list[type], value: dict[str, Any], path: str, places: Places) -> type:
    """Returns the member of a union of dataclasses that a map's `type` names."""
    tagged = by_type(classes)
    if "type" not in value:
        raise _error(places, path, f"config key '{path}.type' is missing. Known: {', '.join(sorted(tagged))}.")
    if not isinstance(value["type"], str) or value["type"] not in tagged:
        raise _error(places, f"{path}.type", str(unknown_name(f"{path}.type", value["type"], tagged)))
    return tagged[value["type"]]


def _build_class(cls: type[T], value: dict[str, Any], path: str, places: Places) -> T:
    """Returns a map as an instance of a dataclass, with the class's defaults for the keys it lacks."""
    prefix = f"{path}." if path else ""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in value:
        if key not in fields:
            message = str(unknown_name("config key", key, fields)).replace(repr(key), repr(prefix + key), 1)
            raise _error(places, prefix + key, message)
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise _error(places, path, f"config key {prefix + name!r} is missing; it has no default.")
    arguments = {key: build(hints[key], item, prefix + key, places) for key, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise _error(places, path, f"config section {path!r}: {error}" if path else str(error)) from None


def _error(places: Places, path: str, message: str) -> InputError:
    """Returns an InputError that starts with the place of `path`, or of the nearest written section around it."""
    while path not in places:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return InputError(f"{places[path]}: {message}")
