"""Checks and times the kernels on this machine's accelerator: `python -m experiments.device_checks --out DIR`.

First every compiled kernel is compared with its reference, then it is timed beside XLA's own program and, where it
exists, jax.nn.dot_product_attention, on caches that together exceed the device's own cache memory. The floor of a case
is the time in which a copy moves the bytes that the case has to move. What was measured is written to DIR/checks.json
and DIR/table.md after every case. A form that fails has its message in place of a time.

On a machine without an accelerator the kernels are run in an interpreter, on small operands, and nothing is timed.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.config import load_config
from experiments.runtime import machine, run_main, setup_runtime
from models.weights.whole import whole_file

PARITY = {"float32": 1e-5, "bfloat16": 1e-2}  # greatest difference to the reference, of results around 1
LEAST_BYTES = 1 << 28  # of all operands that a timed call goes through
MOST_SETS = 16
COLUMNS = ("pallas", "xla", "jax.nn xla", "jax.nn cudnn")


@dataclasses.dataclass(frozen=True)
class DeviceChecksConfig:
    """What to time, and where to write it."""

    out: Path = Path("results/device_checks")
    slots: tuple[int, ...] = (1024, 4096, 16384, 32768, 131072)  # of the cache, or of a prompt
    widths: tuple[int, ...] = (1, 8, 64)  # new tokens of a step

    def __post_init__(self) -> None:
        if min(self.slots, default=0) < 512 or any(count % 128 for count in self.slots):
            raise ValueError(f"slots must be multiples of 128 from 512 on, got {self.slots}")
        if min(self.widths, default=0) < 1 or max(self.widths) > 256:
            raise ValueError(f"widths must be from 1 to 256, got {self.widths}")


class Report:
    """What was measured so far, written to a folder after each addition."""

    def __init__(self, folder: Path):
        """Makes the folder."""
        self.folder = folder
        self.found: dict[str, Any] = {"machine": machine(), "bandwidth": None, "parity": [], "timings": []}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Adds a row of "parity" or "timings", shows it and writes both files."""
        self.found[kind].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Writes checks.json and table.md, each whole or not at all."""
        for name, text in {"checks.json": json.dumps(self.found, indent=1), "table.md": self.markdown()}.items():
            with whole_file(self.folder / name) as partial:
                partial.write_text(text, encoding="utf-8")

    def markdown(self) -> str:
        """Returns the page."""
        lines = ["# Kernels on this device", "", self.found["machine"], ""]
        lines += _table(
            ["kernel", "dtype", "greatest difference", "allowed", "passed"],
            [[*(row[key] for key in ("kernel", "dtype", "difference", "allowed")), "yes" if row["passed"] else "NO"]
             for row in self.found["parity"]],
        )  # fmt: skip
        if self.found["bandwidth"] is None:
            return "\n".join([*lines, "", "There is no accelerator here: nothing was timed.", ""])
        lines += ["", f"A copy moves {self.found['bandwidth'] / 1e9:.0f} GB/s, read and written. Microseconds:", ""]
        head = ["kernel", "S", "W", *COLUMNS, "floor", "pallas over floor", "xla over pallas"]
        lines += _table(head, [_timing_cells(row) for row in self.found["timings"]])
        return "\n".join([*lines, ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _timing_cells(row: dict[str, Any]) -> list[str]:
    """Returns one row of the table of times."""

    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value.replace("|", "/")[:60]
        return "-" if value is None else f"{value:.1f}"

    times = {name: row["microseconds"].get(name) for name in COLUMNS}
    pallas, xla = (None if isinstance(times[name], str) else times[name] for name in ("pallas", "xla"))
    ratios = [pallas and pallas / row["floor"], pallas and xla and xla / pallas]
    width = "-" if row["width"] is None else str(row["width"])
    return [row["kernel"], str(row["slots"]), width, *map(cell, [*times.values(), row["floor"], *ratios])]


def check_parity(report: Report, dtype: str, interpreted: bool) -> None:
    """Compares each kernel with its reference on small operands."""
    import jax
    import numpy as np

    from experiments.device_cases import KERNEL, XLA, Sizes, cases

    sizes = Sizes(dtype, batch=2, kv_heads=2, group=3, head_dim=64, page=32, logical=8, chosen=128, block=64)
    options = {"interpret": True} if interpreted else {}
    for case in cases(sizes, (256 if interpreted else 4096,), (3,), **options):
        operands = case.make(jax.random.key(0))
        row = {"kernel": case.kernel, "dtype": dtype, "allowed": PARITY[dtype]}
        try:
            got, expected = (np.asarray(jax.jit(case.sides[name])(*operands), np.float64) for name in (KERNEL, XLA))
        except Exception as error:  # of one kernel; the others are still checked
            report.add("parity", row | {"difference": _message(error), "passed": False})
            continue
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(got - expected).max()) / scale
        report.add("parity", row | {"difference": f"{difference:.1e}", "passed": difference <= PARITY[dtype]})


def copy_bandwidth(num_bytes: int) -> float:
    """Returns bytes per second of a copy, read and written."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(num_bytes // 4, jnp.float32)
    return 2 * array.nbytes / _seconds(jax.jit(lambda x: x + 1.0), (array,))


def time_case(case: Any, bandwidth: float) -> dict[str, Any]:
    """Returns the times of all sides of a `device_cases.Case`."""
    import jax

    count = max(1, min(MOST_SETS, -(-LEAST_BYTES // case.num_bytes)))
    keys = jax.random.split(jax.random.key(1), count)
    times: dict[str, float | str] = {}
    for name, function in case.sides.items():
        prepare = case.prepare.get(name, lambda *operands: operands)
        try:
            own = [jax.block_until_ready(jax.jit(prepare)(*case.make(key))) for key in keys]
            times[name] = _seconds(jax.jit(_one_after_another(function)), (own,)) / count * 1e6
        except Exception as error:  # of one side, as of a device that is too small for it; the others are still timed
            times[name] = _message(error)
    row = {"kernel": case.kernel, "slots": case.slots, "width": case.width, "bytes": case.num_bytes}
    return row | {"floor": case.num_bytes / bandwidth * 1e6, "microseconds": times}


def _one_after_another(function: Any) -> Any:
    """Returns a function of sets of operands that calls `function` on each, none before the one before it is done."""
    import jax
    import jax.numpy as jnp

    def run(sets):
        carry = jnp.zeros((), jnp.float32)
        for q, *rest in sets:
            out = jax.lax.optimization_barrier(function(q + (carry * 1e-30).astype(q.dtype), *rest))
            carry = out.ravel()[0].astype(jnp.float32)
        return carry

    return run


def _seconds(function: Any, operands: tuple[Any, ...]) -> float:
    """Returns the median time of a call, of as many as fit half a second, 30 at most, after one that is not counted."""
    import jax

    def once() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(function(*operands))
        return time.perf_counter() - begin

    once()
    taken = [once()]
    taken += [once() for _ in range(min(29, int(0.5 / taken[0])))]
    return statistics.median(taken)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, times and writes.

    Raises:
        SystemExit: code 1 when a kernel differs from its reference.
    """
    config = load_config(
        DeviceChecksConfig,
        argv,
        prog="python -m experiments.device_checks",
        description=(__doc__ or "").split("\n")[0],
    )
    setup_runtime()
    import jax

    from experiments.device_cases import Sizes, cases

    accelerated = jax.default_backend() in ("gpu", "tpu")
    report = Report(config.out)
    for dtype in PARITY:
        check_parity(report, dtype, interpreted=not accelerated)
    if accelerated:
        report.found["bandwidth"] = copy_bandwidth(1 << 30)
        for case in cases(Sizes(), config.slots, config.widths):
            report.add("timings", time_case(case, report.found["bandwidth"]))
    else:
        print("There is no accelerator here: the kernels were interpreted, and there is nothing to time.")
    failed = [row["kernel"] for row in report.found["parity"] if not row["passed"]]
    if failed:
        sys.exit(f"error: {', '.join(failed)} differ from the reference or fail; see {config.out / 'table.md'}")
    print(f"All kernels equal their references: {config.out / 'table.md'}")


if __name__ == "__main__":
    run_main(main)
