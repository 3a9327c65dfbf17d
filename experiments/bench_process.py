"""A side of a benchmark in a process of its own, so that its peak memory is its own."""

import contextlib
import dataclasses
import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class Repeat:
    """What `steps` updates took: seconds that passed, seconds of the loop's own thread, and the losses."""

    seconds: float
    host: float
    losses: tuple[float, ...]


class PeakMemory:
    """The most memory that this process held since this was made, in bytes; since its start where that is unknown."""

    def __init__(self) -> None:
        """Asks the kernel (Linux alone) to forget the peak so far."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.status: Path | None = Path("/proc/self/status")
        except OSError:
            self.status = None

    def __call__(self) -> int:
        """Returns the bytes."""
        if self.status is not None:
            lines = self.status.read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def _serve(pipe: Connection, make: Callable[[Any], Any], config: Any) -> None:
    """Runs a side: one repeat per True that comes through the pipe; its peak memory after each."""
    try:
        side = make(config)
        pipe.send(side.about)
        peak = PeakMemory()
        while pipe.recv():
            pipe.send((side(), peak()))
    except (InputError, ImportError, OSError, ValueError) as error:
        pipe.send(error)
    except EOFError:  # the other end is gone
        return


class Side:
    """One side in its own process.

    Attributes:
        about: what the side says of itself.
        peak: bytes, after the last repeat.
        losses: of all updates.
    """

    def __init__(self, make: Callable[[Any], Any], config: Any):
        """Starts the process and waits until its model is loaded; raises what the side raised."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, config), daemon=True)
        self.process.start()
        theirs.close()
        self.peak, self.losses = 0, []
        self.about: dict[str, str] = self._answer()

    def __call__(self) -> Repeat:
        """Makes one repeat."""
        self.pipe.send(True)
        repeat, self.peak = self._answer()
        self.losses += repeat.losses
        return repeat

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise InputError(
                f"a side of the benchmark ended with exit code {self.process.exitcode} (its own message is above; out "
                "of memory? a smaller batch_size or length needs less)"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer
