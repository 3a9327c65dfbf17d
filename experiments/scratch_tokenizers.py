"""Tokenizers of new models, by the name that a config gives."""

from collections.abc import Callable

from finetune.code_tokenizer import code_tokenizer
from finetune.othello import othello_tokenizer
from finetune.stories import story_tokenizer
from models.weights.byte_tokenizer import byte_tokenizer
from models.weights.load import load_model
from models.weights.tokenizer import Tokenizer

OWN: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "code": code_tokenizer,
    "othello": othello_tokenizer,
    "stories": story_tokenizer,
}


def scratch_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer of a new model: that of its kind of texts (`bytes`, `code`, `othello`, `stories`), or the
    one of a model (a name or a path).
    """
    return OWN[name]() if name in OWN else load_model(name).tokenizer
