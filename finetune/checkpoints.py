"""Checkpoints of a run: state, frozen values and facts (data position, config), by orbax, in the background.

A checkpoint is there whole or not at all: a run that is killed goes on from the last whole one. The position in the
data is the number of updates made: what batch comes next follows from it and from the data's fingerprint, a fact.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from finetune.state import TrainState
from models.errors import InputError


class Restored(NamedTuple):
    """A checkpoint that was read: state, the adapter's frozen values, facts as they were saved."""

    state: TrainState
    frozen: Any
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder, by the number of updates made.

    Use it as a context manager: leaving it waits for the last save.
    """

    def __init__(self, folder: Path | str, keep: int = 2):
        """Opens a folder, which is made if need be.

        Args:
            folder: where checkpoints lie, each in a folder named by its step.
            keep: how many of the newest stay.

        Raises:
            InputError: the folder cannot be made or written.
        """
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise InputError(f"cannot write checkpoints to {self.folder}: {error.strerror or error}") from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.wait()
        except InputError:
            if error is None:
                raise
        finally:
            self._manager.close()

    def latest(self) -> int | None:
        """Returns the newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, frozen: Any, facts: Mapping[str, Any]) -> None:
        """Starts to save; the state may be given up as soon as this returns. A step that is there already is kept.

        Raises:
            InputError: this save, or the one before it, could not be written (a full disk); older ones are whole.
        """
        step = int(state.step)
        if step == self.latest():
            return
        tree = {"state": jax.tree.map(_own, state), "frozen": frozen}
        args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), facts=ocp.args.JsonSave(dict(facts)))
        try:
            self._manager.save(step, args=args)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when every save has been written; raises InputError where one could not be."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def facts(self) -> dict[str, Any]:
        """Returns the facts of the newest checkpoint."""
        return dict(self._read(facts=ocp.args.JsonRestore()).facts)

    def restore(self, state: TrainState, frozen: Any) -> Restored:
        """Reads the newest checkpoint.

        Args:
            state: what it must fit, with the shardings to restore into: arrays or `jax.ShapeDtypeStruct`s.
            frozen: likewise.

        Raises:
            InputError: there is none, it is damaged, or it does not fit.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"state": state, "frozen": frozen})
        read = self._read(tree=ocp.args.StandardRestore(target), facts=ocp.args.JsonRestore())
        return Restored(read.tree["state"], read.tree["frozen"], dict(read.facts))

    def _read(self, **args: Any) -> Any:
        step = self.latest()
        if step is None:
            raise InputError(f"there is no checkpoint in {self.folder}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # orbax raises many kinds for data that is missing, damaged or of another shape
            raise InputError(
                f"the checkpoint {self.folder / str(step)} cannot be read into this run (another model, adapter or "
                f"optimiser, or a damaged file): {str(error).splitlines()[0]}"
            ) from error

    def _failed(self, error: Exception) -> InputError:
        left = self.latest()
        kept = "there is none yet" if left is None else f"the last whole one is of step {left}"
        return InputError(f"a checkpoint could not be written to {self.folder} ({error}); {kept}")


def _own(value: Any) -> Any:
    """Returns a copy of an array: the original's buffer is written over by the next update while a save goes on."""
    return value.copy() if isinstance(value, jax.Array) else value
