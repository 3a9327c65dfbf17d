"""What a run writes beside its checkpoints: metrics.jsonl, TensorBoard files, and lines or a bar on the terminal.

metrics.jsonl has one line per logged step: {"step": 20, "train/loss": 1.23, ...}. A run that goes on from step n first
drops the lines of later steps, which it will write again.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.weights.whole import whole_file


class RunLog:
    """Writes figures of a run. In a run of several processes, only the first one's log writes anything."""

    def __init__(self, folder: Path, start: int, steps: int, active: bool = True):
        """Opens the files.

        Args:
            folder: of the run.
            start: updates made before.
            steps: updates in all.
            active: whether this process writes.

        Raises:
            InputError: the folder cannot be written.
        """
        self._active, self._steps = active, steps
        if not active:
            return
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        path = folder / "metrics.jsonl"
        try:
            _keep_until(path, start)
            self._lines = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._active:
            self._lines.close()
            self._board.close()
            self._bar.close()

    def text(self, tag: str, text: str) -> None:
        """Shows a text on the board, as it is."""
        if self._active:
            self._board.add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs figures by their tags ("train/loss"); raises InputError where they cannot be written (a full disk)."""
        if not self._active:
            return
        try:
            for tag, value in figures.items():
                self._board.add_scalar(tag, value, step)
            self._lines.write(json.dumps({"step": step, **figures}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise InputError(f"cannot write to {self._lines.name}: {error.strerror or error}") from error
        shown = "  ".join(f"{tag.split('/')[-1]} {value:.4g}" for tag, value in figures.items() if _shown(tag))
        if self._bar.disable:
            print(f"step {step}/{self._steps}  {shown}", flush=True)
        else:
            self._bar.set_postfix_str(shown)

    def advance(self, step: int) -> None:
        """Moves the bar to a step."""
        if self._active:
            self._bar.update(step - self._bar.n)

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._active:
            self._bar.write(line, file=sys.stdout)


def last_figures(folder: Path) -> dict[str, float]:
    """Returns the last value of every figure that a run has logged; none where it has no log."""
    path, found = folder / "metrics.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        found |= json.loads(line)
    found.pop("step", None)
    return found


def _shown(tag: str) -> bool:
    return tag in ("train/loss", "train/learning_rate", "perf/tokens_per_second") or tag.startswith("eval/")


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and a last line that was never finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    with whole_file(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
