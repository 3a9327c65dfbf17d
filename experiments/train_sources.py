"""What the rows of a training run are like where something beside the decoder reads a source of each."""

from experiments.train_config import TrainConfig
from finetune.rows import Compressed, Pairs
from models.dolphin import Dolphin
from models.encoder_decoder import EncoderDecoder, Network
from models.errors import InputError
from models.weights.tokenizer import Tokenizer


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
