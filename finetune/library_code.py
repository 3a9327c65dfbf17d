"""Pairs of a docstring and its function from the modules of Python's own library, read from the interpreter that runs.

The description is the docstring's first paragraph, the function its source without the docstring. Equal descriptions
and equal functions count once: two functions with one docstring would be each other's wrong answers. Which pairs are
for testing is told by a hash of the description.
"""

import ast
import functools
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

from finetune.corpus import Example
from models.errors import InputError

_TEST_SHARE = 8  # one pair of so many is for testing
_SHORTEST = 12  # characters of a description


@functools.cache
def library_pairs(test: bool) -> tuple[Example, ...]:
    """Returns all pairs for testing, or for training, in the order of files and lines.

    Raises:
        InputError: the interpreter comes without the source of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    codes: set[str] = set()
    for path in sorted(root.glob("*.py")):
        for text, code in functions_of(path.read_text(encoding="utf-8", errors="replace")):
            if text not in found and code not in codes:
                found[text] = code
                codes.add(code)
    if not found:
        raise InputError(f"no source of Python's library in {root}: take another interpreter, or generated pairs")
    return tuple(
        Example(text + "\n", code, "library")
        for text, code in found.items()
        if (zlib.crc32(text.encode()) % _TEST_SHARE == 0) == test
    )


def functions_of(source: str) -> Iterator[tuple[str, str]]:
    """Yields (description, function without its docstring) of every function in a file that has a docstring."""
    tree = _parsed(source)
    lines = source.splitlines()
    for node in () if tree is None else ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        text = ast.get_docstring(node)
        described = " ".join((text or "").split("\n\n")[0].split())
        if len(described) < _SHORTEST:
            continue
        first = node.body[0]
        kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
        code = textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))
        if _parsed(code) is not None:  # a text over several lines keeps a method from moving to the margin
            yield described, code


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None
