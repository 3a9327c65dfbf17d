"""Mains called as a command line calls them."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from experiments.runtime import run_main


def call_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, main: Callable[[], Any], *flags: Any
) -> tuple[int, str, str]:
    """Runs a main with flags on its command line; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["main", *map(str, flags)])
    code = 0
    try:
        run_main(main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()
