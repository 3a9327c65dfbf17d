"""What every main does around its work: clean errors, exit codes, and XLA's compilation cache.

    if __name__ == "__main__":
        run_main(main)

`main` loads its config first and calls `setup_runtime()` after, so that `--help` and config errors never wait for JAX.
"""

import functools
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from models.errors import InputError


def run_main(main: Callable[[], None]) -> None:
    """Runs a main and turns what the user can mend into a message.

    Any other exception is a bug of ours and keeps its traceback.

    Raises:
        SystemExit: code 2 after an InputError (its message is on stderr as "error: ..."), code 130 after Ctrl-C, code
            141 where nobody reads what is printed any more (`| head`).
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes when it ends goes nowhere
        sys.exit(141)


def setup_runtime() -> None:
    """Turns on XLA's persistent compilation cache in $FLEETLM_CACHE/xla, ~/.cache/fleetlm/xla by default.

    Compilations of half a second or more are kept between runs. When JAX_COMPILATION_CACHE_DIR is set, the cache and
    its thresholds stay as the user has them. Call it before the first compilation.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    import jax

    folder = Path(os.environ.get("FLEETLM_CACHE") or "~/.cache/fleetlm").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def forget_programs(share: float = 0.3) -> bool:
    """Forgets what was compiled, where that took more than `share` of the memory maps that Linux lets a process have.

    A compiled program takes maps of its own, thousands for a model of thirty layers, and at the last map the process
    dies. Call it between measurements that compile anew: what is still needed is read from the cache on disk.

    Returns:
        Whether it did; never on other systems.
    """
    maps, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not (maps.exists() and most.exists()):
        return False
    with maps.open() as lines:
        if sum(1 for _ in lines) <= share * int(most.read_text()):
            return False
    import jax

    jax.clear_caches()
    return True


@functools.cache
def machine() -> str:
    """Returns the machine and the versions, in a line."""
    import jax

    device = jax.devices()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax"))
    return (
        f"Measured on {len(jax.devices())} {device.platform} device(s) ({device.device_kind}), {os.cpu_count()} CPU "
        f"cores ({platform.machine()}), Python {platform.python_version()}, {versions}."
    )
