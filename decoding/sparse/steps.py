"""The steps of methods that decode with an attention policy: of one token, or with what prompt lookup drafts."""

import dataclasses

from decoding.autoregressive import sampling_steps
from decoding.method import Policy, Steps
from decoding.speculative.loop import make_speculative
from decoding.speculative.prompt_lookup import PromptLookupOptions, lookup_drafter
from models.decoder import Decoder
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class SparseOptions:
    """What every method with an attention policy can be told.

    Attributes:
        drafted: tokens per step that prompt lookup drafts and one sparse pass verifies; 0: one token per step.
    """

    drafted: int = 0

    def __post_init__(self) -> None:
        if self.drafted < 0:
            raise InputError(f"drafted must be 0 (no drafts) or more tokens, got {self.drafted}")


def policy_steps(model: Decoder, policy: Policy, options: SparseOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Returns steps that sample (greedily at temperature 0), the target attending as `policy` says."""
    if options.drafted == 0:
        return sampling_steps(model, stop_tokens, policy)
    drafter = lookup_drafter(PromptLookupOptions(length=options.drafted))
    return make_speculative(model, drafter, stop_tokens, policy)
