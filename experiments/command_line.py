"""The command line of every main: flags split, completed and handed to tyro.

A flag is `--section.key value`, `--section.key=value` or, for booleans, `--key` / `--no-key`; dashes and underscores in
names are the same. tyro does the typed parsing, the help page and the messages; what is here and in `config.py` adds
what it lacks: `--config`, repeated flags for tuples (`--prompt A --prompt B`), choosing the member of a union
(`--method.type beam`) and free-form options by key (`--method.options.width 4`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from experiments.schema import is_free_form
from models.errors import InputError

T = TypeVar("T")
_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(=.*)?\Z|-h\Z", re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """One flag with the tokens up to the next flag.

    Attributes:
        name: dotted, underscores for dashes; "" for `-h` and for tokens before the first flag.
        tokens: as typed, the flag itself first.
    """

    name: str
    tokens: tuple[str, ...]

    @property
    def values(self) -> list[str]:
        """The values given, the one after `=` first."""
        head, *rest = self.tokens
        _, equals, first = head.partition("=")
        return [first, *rest] if equals else rest


def split_flags(argv: Sequence[str]) -> list[Flag]:
    """Groups the tokens of a command line by flag, in order."""
    flags: list[Flag] = []
    for token in argv:
        match = _FLAG.match(token)
        if match or not flags:
            name = match[1] if match else None
            flags.append(Flag((name or "").replace("-", "_"), (token,)))
        else:
            flags[-1] = Flag(flags[-1].name, (*flags[-1].tokens, token))
    return flags


def take_config_path(flags: Sequence[Flag]) -> tuple[Path | None, list[Flag]]:
    """Returns the file named by `--config`, None without one, and the other flags.

    Raises:
        InputError: `--config` names no file, or several.
    """
    files = [value for flag in flags if flag.name == "config" for value in flag.values or [""]]
    if len(files) > 1 or files == [""]:
        seen = " ".join(files) or "none"
        raise InputError(f"--config takes one YAML file, got {seen}. A file may build on another: `base: B.yaml`.")
    return Path(files[0]) if files else None, [flag for flag in flags if flag.name != "config"]


def parse_flags(
    config: T,
    flags: Sequence[Flag],
    *,
    repeatable: Collection[str],
    members: Mapping[str, Sequence[str]],
    prog: str,
    description: str,
) -> T:
    """Returns `config` with the values of the flags in place of its own; `--help` prints the flags and exits.

    Args:
        config: a dataclass instance; a field that is a union of dataclasses keeps the member it has.
        flags: what the user typed, without `--config` and free-form options.
        repeatable: the flags whose values add up when repeated; of any other repeated flag the last one counts.
        members: name of a union of dataclasses -> its `type` values, for the help page.
        prog: the program's name on the help page.
        description: what the program does, for the help page.

    Raises:
        SystemExit: with code 2 after a message on stderr for a wrong flag or value, with code 0 after `--help`.
    """
    tokens: dict[str | int, list[str]] = {}
    for index, flag in enumerate(flags):
        key = flag.name if flag.name in repeatable else index
        tokens[key] = tokens[key] + flag.values if key in tokens else list(flag.tokens)
    types = "".join(f"\n--{name}.type is one of: {', '.join(tags)}." for name, tags in members.items())
    return tyro.cli(
        type(config),
        default=config,
        args=[token for group in tokens.values() for token in group],
        prog=prog,
        description=f"{description}\n--config FILE.yaml sets any of the values below; flags override it.{types}",
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
        registry=_REGISTRY,
    )


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _free_form_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Shows a free-form map as one line on the help page; its keys are set before tyro runs."""
    if not is_free_form(info.type):
        return None

    def refuse(values: list[str]) -> Any:
        raise ValueError(f"set one key at a time, as in --SECTION.KEY VALUE; got {values[0]!r}")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=".KEY VALUE",
        instance_from_str=refuse,
        is_instance=lambda value: value is None or isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={item}" for key, item in (value or {}).items()],
    )
