"""Whether a run may go on in a folder: what the folder holds, and what was set when it was started."""

from pathlib import Path
from typing import Any

from experiments.config import dump_config
from experiments.train_config import TrainConfig
from finetune.packing import Batches
from models.errors import InputError

# What decides where a run comes out; the rest of a config, and the learning rate, may change when it goes on.
_DECIDES = (
    *("model", "scratch", "growth", "join", "dtype", "adapter", "data", "objective", "optimizer"),
    *("dolphin", "batch_size", "length", "source_length", "packing"),
)


def facts_of(config: TrainConfig, batches: Batches, base: Any) -> dict[str, Any]:
    """Returns what a checkpoint says of its run; `base` is what an adapter says of its model, None without one."""
    bases = [base] if hasattr(base, "content") else base or ()
    return {"config": dump_config(config), "data": batches.fingerprint, "base": [each.content for each in bases]}


def check_same(config: TrainConfig, facts: dict[str, Any], then: dict[str, Any]) -> tuple[str, ...]:
    """Returns what is to be said of going on.

    Args:
        config: of the run.
        facts: `facts_of` the run as it is now.
        then: those of its checkpoint.

    Raises:
        InputError: the checkpoint came of other settings, other data or another model.
    """
    import yaml

    now, before = (yaml.safe_load(each["config"]) for each in (facts, then))
    for settings in (now, before):
        settings["optimizer"].pop("learning_rate", None)
    for name in (*_DECIDES, "seed"):
        if now[name] != before.get(name):
            raise InputError(
                f"the run in {config.run_dir} was started with another {name}: {before.get(name)!r}, now "
                f"{now[name]!r}; choose another run_dir, or set it back to go on"
            )
    if facts["data"] != then["data"]:
        raise InputError(f"the data is not what the run in {config.run_dir} was trained on; choose another run_dir")
    if facts["base"] != then.get("base", facts["base"]):
        raise InputError(f"the run in {config.run_dir} started from another model; choose another run_dir")
    if now["steps"] == before["steps"]:
        return ()
    return (
        f"the run was planned for {before['steps']} updates and is now for {now['steps']}: what follows the plan (the "
        "learning rate, what an adapter gives up on the way) follows the new one from here on",
    )


def other_settings(run: TrainConfig) -> bool:
    """Whether a run's folder was left by a run with other settings."""
    saved = run.run_dir / "config.yaml"
    return not saved.is_file() or saved.read_text(encoding="utf-8") != dump_config(run)


def check_folder(folder: Path) -> None:
    """Raises InputError where a folder holds other things than a run's."""
    import yaml

    if not folder.exists() or (folder.is_dir() and not {path.name for path in folder.iterdir()} - {".lock"}):
        return
    if (folder / "checkpoints").is_dir():
        return
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        saved = None
    if not isinstance(saved, dict) or "run_dir" not in saved:
        raise InputError(f"{folder} is not empty and holds no run: choose another run_dir, or empty it")
