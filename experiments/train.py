"""Trains a model or an adapter: `python -m experiments.train --config configs/train/lora.yaml --run_dir runs/lora`.

A run is a folder: run the same command again and it goes on where it stopped. On a pod, start the same command on every
host.
"""

from experiments.config import load_config
from experiments.runtime import run_main, setup_runtime
from experiments.train_config import TrainConfig

_PROG = "python -m experiments.train"


def main() -> None:
    """Loads the config and trains, or prints what training would take."""
    config = load_config(TrainConfig, prog=_PROG, description=(__doc__ or "").split("\n")[0])
    from finetune.distributed import initialize, is_main

    setup_runtime()
    initialize(config.distributed)
    if config.dry_run:
        from experiments.dry_run import describe

        print(describe(config))
        return
    from experiments.training import run_training

    figures = run_training(config)
    if is_main():
        print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        print(f"saved in {config.run_dir}/")


if __name__ == "__main__":
    run_main(main)
