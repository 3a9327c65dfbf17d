"""Comparing searches with the texts in tests/golden/search.json."""

from typing import Any

import numpy as np

from decoding import make_decode_fn
from models.decoder import Decoder


def cases_of(golden: dict[str, Any], method: str) -> list[dict]:
    """Returns all cases of a method."""
    return [row for program in golden["programs"] if program["method"] == method for row in program["rows"]]


def compared(model: Decoder, params: Any, program: dict, prompts: list[list[int]], new_tokens: int) -> None:
    """Fails where a text of a program (one compiled function, many prompts and settings) is another one.

    Beam search must give the same texts in the same order with the same scores. Diverse beam search ranks texts of all
    groups by their plain log-probability, where transformers ranks by what is left of it behind the penalty: the same
    texts are wanted, as often.
    """
    method, options, rows = program["method"], program["options"], program["rows"]
    several = {} if method == "contrastive" else {"num_return": options["width"]}
    fn = make_decode_fn(model, method, max_new_tokens=new_tokens, stop_tokens=program["stops"], **options, **several)
    settings = {program["setting"]: [row["value"] for row in rows]}
    output = fn(params, [prompts[row["prompt"]] for row in rows], **settings)
    if method == "contrastive":
        tokens, lengths = np.asarray(output.tokens)[:, None], np.asarray(output.lengths)[:, None]
    else:
        tokens, lengths = np.asarray(output.found.tokens), np.asarray(output.found.lengths)
    for index, row in enumerate(rows):
        found = [text[:length].tolist() for text, length in zip(tokens[index], lengths[index], strict=True)]
        if method == "diverse_beam":
            assert sorted(found) == sorted(row["texts"]), row
        else:
            assert found == row["texts"], row
        if method == "beam":
            np.testing.assert_allclose(output.found.scores[index], row["scores"], atol=1e-3)
