"""Diverse beam search: beams in groups, of which each is held off what the groups before it choose. Lossy.

Source: "Diverse Beam Search: Decoding Diverse Solutions from Neural Sequence Models" (1610.02424), algorithm 1. At each
step the groups choose one after another; `strength` (lambda) times a term of `decoding.search.diversity` is taken off
the log-probabilities of what earlier groups have just chosen. The penalty adds up in the sum that a group is searched
by; texts of different groups are ranked by their plain log-probability over length ** length_penalty.

Deviations: all groups read one forward pass of the same step, where the released code lets group g lag g steps behind,
which gives the same texts. Beams that a stop token has finished leave their places to others, and no longer hold later
groups off. `cumulative` has an exponent for each pair of beams (see there); `embedding` compares the model's own input
vectors, of the tokens just chosen. Term `hamming` agrees with Hugging Face's group beam search token by token where no
text stops early.

The counts are those of `decoding.search.beam`.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

from decoding.arguments import Setting
from decoding.method import Method, Steps
from decoding.search import diversity
from decoding.search.beam import BeamOptions
from decoding.search.beams import LENGTH_PENALTY, check_search, search_steps
from decoding.search.group import Search
from models.decoder import Decoder
from models.errors import InputError

TERMS = ("hamming", "cumulative", "ngram", "embedding")
SETTINGS = {
    "length_penalty": LENGTH_PENALTY,
    "strength": Setting(0.5, np.float32, ">= 0 and finite", lambda x: (x >= 0) & np.isfinite(x)),
    "gamma": Setting(4.0, np.float32, "in [0.01, 1000]", lambda x: (x >= 0.01) & (x <= 1000)),
}


@dataclasses.dataclass(frozen=True)
class DiverseBeamOptions(BeamOptions):
    """Those of `beam`; `width` counts the beams of all groups together.

    Attributes:
        groups: groups of equal size; as many as beams is what the paper mostly uses.
        term: what makes texts alike: `hamming` one token at one place, `cumulative` many places (setting `gamma`: how
            many differences set texts apart), `ngram` the same n tokens anywhere, `embedding` tokens of one meaning.
        n: tokens of an n-gram.
    """

    groups: int = 4
    term: Literal["hamming", "cumulative", "ngram", "embedding"] = "hamming"
    n: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.term not in TERMS:
            raise InputError(f"term must be one of {', '.join(TERMS)}, got {self.term!r}")
        if self.n < 1:
            raise InputError(f"n must be at least 1 token, got {self.n}")

    def search(self) -> Search:
        """Returns them as those of a search; raises InputError where they cannot be."""
        return dataclasses.replace(super().search(), groups=self.groups)


def make_diverse_beam(model: Decoder, options: DiverseBeamOptions, stop_tokens: tuple[int, ...]) -> Steps:
    """Diverse beam search; raises InputError where a group has more beams than there are tokens."""
    check_search(model, options.search())
    vocab = model.config.vocab_size
    terms = {
        "hamming": lambda chosen, own, memory: diversity.hamming(chosen, vocab),
        "cumulative": lambda chosen, own, memory: diversity.cumulative(chosen, vocab, own["gamma"]),
        "ngram": lambda chosen, own, memory: diversity.ngram(chosen, vocab, options.n),
        "embedding": lambda chosen, own, memory: diversity.embedding(chosen, memory),
    }
    steps = functools.partial(search_steps, model, options.search(), stop_tokens, terms[options.term])
    return steps(diversity.vectors) if options.term == "embedding" else steps()


DIVERSE_BEAM = Method("lossy", DiverseBeamOptions, make_diverse_beam, encoders=True, settings=SETTINGS)
