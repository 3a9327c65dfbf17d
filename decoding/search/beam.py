"""Beam search: the `width` likeliest texts so far are kept at each step. Lossy.

Finished texts are ranked by their log-probability over length ** length_penalty (a setting; 0 ranks by probability,
larger values favour longer texts). `DecodeOutput.tokens` is the best text, `DecodeOutput.found` has the best
`num_return` with their scores. What a row writes shows when the row is done: until then it may change.

In the counts a step is a pass over all beams of a row; `emitted` are the tokens of the best text, which may be fewer
than steps.
"""

import dataclasses
from typing import Literal

from decoding.method import Method, Steps
from decoding.search.beams import LENGTH_PENALTY, check_search, search_steps
from decoding.search.constraints import ScoredOptions
from decoding.search.group import Search
from models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class BeamOptions(ScoredOptions):
    """See `decoding.search.group.Search` for what they mean.

    Attributes:
        width: beams of a row.
        num_return: texts that are returned per row.
        early_stopping: when a row (or a group of its beams) with as many finished texts as beams ends.
    """

    width: int = 4
    num_return: int = 1
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.search()

    def search(self) -> Search:
        """Returns them as those of a search; raises InputError where they cannot be."""
        return Search(self.width, 1, self.num_return, self.early_stopping, self.return_scores, self.constraints)


def make_beam(model: Decoder, options: BeamOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Beam search; raises InputError where there are more beams than tokens."""
    check_search(model, options.search())
    return search_steps(model, options.search(), stop_tokens)


BEAM = Method("lossy", BeamOptions, make_beam, encoders=True, settings={"length_penalty": LENGTH_PENALTY})
