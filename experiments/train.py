"""Trains a model or an adapter: `python -m experiments.train --config configs/train/lora.yaml --run_dir runs/lora`.

A run is a folder: run the same command again and it goes on where it stopped. On a pod, start the same command on every
host.
"""

from experiments.config import load_config
from experiments.runtime import run_main, setup_runtime
from experiments.train_config import TrainConfig

_PROG = "python -m experiments.train"


def describe(config: TrainConfig) -> str:
    """Returns what a run keeps and how it is spread over its mesh, which need not be here; reads no weights of it."""
    import jax
    import jax.numpy as jnp

    from experiments.scratch_tokenizers import scratch_tokenizer
    from finetune import state
    from finetune.adapters import make_adapter
    from finetune.codet5plus import CodeT5PlusConfig, slow_part
    from finetune.dry_run import adapter_shapes, dry_run, model_shapes, render
    from finetune.objective_configs import DistillationConfig, EmoConfig
    from finetune.optimizers import make_optimizer
    from models.decoder import Decoder
    from models.encoder_decoder import decoder_only, network, writing_stack
    from models.growth import grow_config
    from models.joined import join_config, trained_apart
    from models.scratch import scratch_model
    from models.sharding import abstract_mesh
    from models.weights.load import read_config

    if config.scratch is not None:
        model = scratch_model(config.scratch, scratch_tokenizer(config.scratch.tokenizer).vocab_size)
    else:
        model = network(read_config(config.model))
        if config.growth is not None:
            model = Decoder(grow_config(decoder_only(model, "growth").config, config.growth))
        if config.join is not None:
            parts = (decoder_only(part, "joining") for part in (network(read_config(config.join.encoder)), model))
            model = network(join_config(*(part.config for part in parts), config.join))
    base, frozen = model_shapes(model, config.dtype or "float32"), {}
    if config.join is not None:
        base, trainable = trained_apart(base)
        method = state.part_tuning(jax.tree.map(lambda x: x.dtype, trainable))
    elif config.adapter is None:
        base, trainable, method = {}, model_shapes(model), state.full_tuning(jax.tree.map(lambda x: x.dtype, base))
    else:
        adapter = make_adapter(config.adapter)
        frozen, trainable = adapter_shapes(adapter, base, config.adapter.targets)
        method = state.adapter_tuning(adapter)
    optimizer = make_optimizer(config.optimizer, config.steps, method)
    read = None
    if isinstance(config.objective, EmoConfig):
        writing = writing_stack(model, {"decoder": None})[0].config
        read = jax.ShapeDtypeStruct((writing.width, writing.vocab_size), jnp.float32)
    elif isinstance(config.objective, DistillationConfig):
        read = model_shapes(network(read_config(config.objective.teacher)), config.dtype or "float32")
    elif isinstance(config.objective, CodeT5PlusConfig):
        read = slow_part(model_shapes(model))
    return render(dry_run(base, frozen, trainable, optimizer, abstract_mesh(config.mesh), read))


def main() -> None:
    """Loads the config and trains, or prints what training would take."""
    config = load_config(TrainConfig, prog=_PROG, description=(__doc__ or "").split("\n")[0])
    from finetune.distributed import initialize, is_main

    setup_runtime()
    initialize(config.distributed)
    if config.dry_run:
        print(describe(config))
        return
    from experiments.training import run_training

    figures = run_training(config)
    if is_main():
        print("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        print(f"saved in {config.run_dir}/")


if __name__ == "__main__":
    run_main(main)
