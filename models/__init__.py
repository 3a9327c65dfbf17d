"""Networks and weights. Knows nothing of decoding or training."""

from models.config import DecoderConfig as DecoderConfig
from models.decoder import Decoder as Decoder
from models.errors import InputError as InputError
from models.weights.load import LoadedModel as LoadedModel
from models.weights.load import load_model as load_model
from models.weights.orbax import save_model as save_model
