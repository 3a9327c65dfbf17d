"""Files of JSON lines whose objects have texts under known keys: prompts, texts of several languages."""

import json
from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError


def text_records(path: Path, what: str, *keys: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, the texts under the keys) of each line that is not blank.

    Args:
        path: the file, in UTF-8.
        what: the file is called in messages, as in "prompts file".
        *keys: that every object has; others are not read.

    Raises:
        InputError: no such file, one that cannot be read, or a bad line (named by number).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"no such {what}: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {what} {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            values = {key: record[key] for key in keys}
        except (ValueError, KeyError, TypeError) as error:
            example = json.dumps(dict.fromkeys(keys, "text"))
            raise InputError(f"{path}:{number}: wanted an object like {example}, got {line:.80}") from error
        for key, value in values.items():
            if not isinstance(value, str):
                raise InputError(f"{path}:{number}: the {key} must be text, got {value!r:.80}")
        yield number, values
