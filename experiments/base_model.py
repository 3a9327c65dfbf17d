"""What a run of training starts from: the model, and what of it depends on the model."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from experiments.joining import joined
from experiments.scratch_tokenizers import scratch_tokenizer
from experiments.train_config import TrainConfig
from experiments.train_dolphin import load_pair
from finetune.objective_configs import DistillationConfig, make_objective
from finetune.objectives import BatchObjective, Objective
from finetune.rows import Compressed, Pairs
from models.dolphin import Dolphin
from models.encoder_decoder import EncoderDecoder, Network, decoder_only, init_params, network
from models.errors import InputError
from models.growth import grow
from models.sharding import build
from models.weights.tokenizer import Tokenizer


class Base(NamedTuple):
    """The model that a run starts from; `name` is what an adapter of it will say that it belongs to."""

    name: str
    model: Network
    params: Any
    tokenizer: Tokenizer
    reader: Tokenizer | None = None  # a compressor's
    bases: Any = None  # what a pair of decoders is made of


def load_base(config: TrainConfig, mesh: Mesh) -> Base:
    """Loads the model to be trained, or makes a new one, spread over a mesh."""
    from models.scratch import scratch_model
    from models.weights.load import load_model

    if config.scratch is None:
        model, params, tokenizer = load_model(config.model, config.dtype, mesh)
        if tokenizer is None:
            raise InputError(f"{config.model} has no tokenizer.json: put the model's tokenizer.json into the folder")
        name = Path(config.model).name
        if config.growth is not None:
            model, params = grow(decoder_only(model, "growth"), params, config.growth)
        if config.join is not None:
            model, params = joined(config, model, params, tokenizer)
    else:
        shape = config.scratch
        tokenizer = scratch_tokenizer(shape.tokenizer)
        model, name = scratch_model(shape, tokenizer.vocab_size), "scratch"
        params = build(lambda: init_params(model, jax.random.key(config.seed)), mesh=mesh)
    if config.length > model.config.max_length:
        raise InputError(f"length {config.length} is more than the model's context of {model.config.max_length} tokens")
    base = Base(name, network(model.config, config.remat), params, tokenizer)
    return base if config.dolphin is None else load_pair(config, base, mesh)


def pairs_of(config: TrainConfig, model: Network, reader: Tokenizer | None = None) -> Pairs | Compressed | None:
    """Returns what the rows of a model with an encoder or a compressor are like; None for any other."""
    if isinstance(model, Dolphin):
        source_length = config.source_length or config.length
        if source_length > model.config.longest:
            raise InputError(f"source_length {source_length} is more than the compressor reads, {model.config.longest}")
        return Compressed(reader, model.config.memory, source_length)
    if not isinstance(model, EncoderDecoder):
        if config.source_length is not None:
            raise InputError("source_length is for models with an encoder, which this one has not: leave it out (null)")
        return None
    source_length, most = config.source_length or config.length, model.config.encoder.max_length
    if source_length > most:
        raise InputError(f"source_length {source_length} is more than the {most} tokens that the model's encoder reads")
    return Pairs(model.config.start_token, source_length)


def objective_of(config: TrainConfig, base: Base, mesh: Mesh) -> Objective | BatchObjective:
    """Returns what a run minimises; reads the teacher where it has one."""
    from models.weights.load import load_model

    teacher = None
    if isinstance(config.objective, DistillationConfig):
        *teacher, tokenizer = load_model(config.objective.teacher, config.dtype, mesh)
        if tokenizer is None or tokenizer.backend.get_vocab() != base.tokenizer.backend.get_vocab():
            raise InputError(
                f"the teacher {config.objective.teacher} reads other tokens than the model {base.name}: take a teacher "
                "with the same tokenizer"
            )
    stops = tuple(base.tokenizer.stop_ids)
    lengths = (config.source_length or config.length, config.length)
    return make_objective(
        config.objective,
        base.model,
        base.params,
        base.tokenizer.vocab_size,
        teacher,
        stops,
        tokenizer=base.tokenizer,
        lengths=lengths,
    )
