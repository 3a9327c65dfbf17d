"""Checkpoints: whole or not there, newest first, refused where they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from finetune.checkpoints import Checkpoints
from finetune.state import TrainState, new_state
from models.errors import InputError

OPTIMIZER = optax.adam(1e-3)


def state_at(step: int, width: int = 4) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):
        state = new_state({"m": {"a": jnp.full((3, width), float(step))}}, OPTIMIZER)
    return state.replace(step=jnp.asarray(step, jnp.int32))


FROZEN = {"m": {"u": jnp.arange(6.0)}, "n": {}}


def test_the_newest_of_those_kept_is_restored_with_its_facts(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (2, 4, 6):
            checkpoints.save(state_at(step), FROZEN, {"data": f"at {step}"})
        checkpoints.wait()
        restored = checkpoints.restore(state_at(0), jax.tree.map(jnp.zeros_like, FROZEN))
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == [4, 6]
    assert int(restored.state.step) == 6 and restored.facts == {"data": "at 6"}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(6))
    jax.tree.map(np.testing.assert_array_equal, restored.frozen, FROZEN)


def test_a_save_keeps_what_the_state_was_when_its_buffers_are_given_up(tmp_path):
    negated = lambda state: state.replace(trainable=jax.tree.map(jnp.negative, state.trainable))  # noqa: E731
    update = jax.jit(negated, donate_argnums=0)
    state = state_at(7, width=100_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, FROZEN, {})
        for _ in range(3):
            state = update(state)
        checkpoints.wait()
        restored = checkpoints.restore(state_at(0, width=100_000), FROZEN).state
    assert float(restored.trainable["m"]["a"].min()) == float(restored.trainable["m"]["a"].max()) == 7.0


def test_what_an_interrupted_save_left_is_not_taken_for_a_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), FROZEN, {})
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "5.orbax-checkpoint-tmp" / "tree").write_text("half")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), FROZEN, {})
        checkpoints.wait()
        with pytest.raises(InputError, match="cannot be read into this run"):
            checkpoints.restore(state_at(0, width=5), FROZEN)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), FROZEN, {})
    for path in (tmp_path / "3" / "tree").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="cannot be read"):
        checkpoints.restore(state_at(0), FROZEN)


def test_a_full_disk_is_told_and_leaves_the_last_whole_one(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), FROZEN, {})
        checkpoints.wait()
        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(InputError, match="No space left on device.*last whole one is of step 3"):
            checkpoints.save(state_at(4), FROZEN, {})
        assert checkpoints.latest() == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "c")


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="no checkpoint in"):
        checkpoints.restore(state_at(0), FROZEN)
