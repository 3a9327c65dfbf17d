"""Errors that a user can mend.

Every check on what a user passes raises `InputError`: its message says what was wrong, the value seen, the values
allowed and what to type instead. The mains in `experiments/` print that message alone and exit with code 2; any other
exception is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A wrong argument, file, name or configuration, told in words the user can act on."""


def unknown_name(kind: str, seen: str, known: Iterable[str]) -> InputError:
    """Returns the error for a name that is not in a registry, with the closest match first.

    Args:
        kind: what the name should have named, in the singular ("model", "method", "config key").
        seen: the name as the user gave it.
        known: the names that exist.
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(seen), known, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return InputError(f"unknown {kind} {seen!r}.{hint} Known: {', '.join(known)}.")
