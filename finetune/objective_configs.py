"""What is minimised, from a config: every objective's settings, told apart by `type`, and `make_objective`."""

import dataclasses
from typing import Any, Literal

from finetune.codet5plus import CodeT5PlusConfig, codet5plus
from finetune.distillation import DistillationConfig, distillation
from finetune.emo import EmoConfig, emo, head_directions
from finetune.lexical_units import LexicalUnitConfig, lexical_units
from finetune.objectives import BatchObjective, Objective, cross_entropy
from models.encoder_decoder import Network, writing_stack
from models.errors import InputError
from models.weights.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """Cross-entropy with the labels.

    Attributes:
        z_loss: weight of log(Z)^2, at least 0 (`finetune.objectives.cross_entropy`).
    """

    type: Literal["cross_entropy"] = "cross_entropy"
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not self.z_loss >= 0:
            raise InputError(f"z_loss must not be negative, got {self.z_loss}")


ObjectiveConfig = CrossEntropyConfig | EmoConfig | DistillationConfig | CodeT5PlusConfig | LexicalUnitConfig


def make_objective(
    config: ObjectiveConfig,
    model: Network,
    params: Any,
    num_tokens: int,
    teacher: tuple[Network, Any] | None = None,
    stop_tokens: tuple[int, ...] = (),
    tokenizer: Tokenizer | None = None,
    lengths: tuple[int, int] | None = None,
) -> Objective | BatchObjective:
    """Returns the objective that a config stands for.

    Args:
        config: of any objective.
        model: the network to be trained.
        params: its parameters at the start; read now, never kept.
        num_tokens: ids of the tokenizer; a model's vocabulary may have rows behind them, as padding.
        teacher: (network, parameters) of the model that a `DistillationConfig` names, of the same tokenizer.
        stop_tokens: that end what a model writes, where an objective lets it write.
        tokenizer: of the model; objectives that look at tokens need it.
        lengths: tokens of the longest text that an encoder reads, and of the longest row; for objectives on pairs.

    Raises:
        InputError: more ids than a model has rows for, or distillation without a teacher.
    """
    _check_tokens("the model", model, num_tokens)
    if isinstance(config, EmoConfig):
        writing, params = writing_stack(model, params)
        return emo(config, head_directions(writing.config, params, num_tokens))
    if isinstance(config, LexicalUnitConfig):
        return lexical_units(config, model)
    if isinstance(config, DistillationConfig):
        if teacher is None:
            raise InputError("distillation needs a teacher: pass teacher=(model, params)")
        _check_tokens("the teacher", teacher[0], num_tokens)
        return distillation(config, *teacher, num_tokens, model, stop_tokens)
    if isinstance(config, CodeT5PlusConfig):
        return codet5plus(config, model, tokenizer, lengths)
    return cross_entropy(config.z_loss)


def _check_tokens(who: str, model: Network, num_tokens: int) -> None:
    if not 1 <= num_tokens <= model.config.vocab_size:
        raise InputError(
            f"{who} has rows for {model.config.vocab_size} ids, but the tokenizer has {num_tokens}: take the tokenizer "
            "that belongs to it"
        )
