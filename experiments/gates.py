"""Which heads of `lserve` stream, where a config names a source in place of the gates themselves.

    gates: measured     the share of attention that falls between sink and window (`decoding.sparse.gates.head_gates`)
    gates: 1            random gates of this seed: the control

Gates are measured on documents that code writes, one of sentences and one of keys and values, each twice in a row: what
the second copy says can be read off the first, by heads that see that far.
"""

import random
from typing import Any

from experiments.generated import generate
from models.errors import InputError

MEASURED = "measured"
_TOKENS = 1024  # of a text; more where sink and window are wide
_TOKENS_PER_WORD = {"needle": 1, "key_value": 4}  # at least
Gates = tuple[tuple[float, ...], ...]


def gates_from(source: str | int, model: Any, params: Any, tokenizer: Any, *, sink: int, local: int) -> Gates:
    """Returns gates, one number per layer and key/value head.

    Args:
        source: "measured", or the seed of random ones.
        model: the network.
        params: its parameters.
        tokenizer: the model's.
        sink: first tokens that a streaming head sees.
        local: last tokens that it sees.

    Raises:
        InputError: another source, or a model whose context has no room between sink and window.
    """
    if isinstance(source, int):
        rng = random.Random(source)
        return tuple(tuple(rng.random() for _ in range(b.attention.num_kv_heads)) for b in model.config.blocks)
    if source != MEASURED:
        raise InputError(f"gates must be {MEASURED!r}, the seed of random ones, or the numbers; got {source!r}")
    import numpy as np

    from decoding.sparse.gates import head_gates

    half = min(max(_TOKENS // 2, sink + local), model.config.max_length // 2)
    found = []
    for task, tokens in _TOKENS_PER_WORD.items():
        document = generate((task,), 1, seed=-1, document_words=max(60, half // tokens + 2))[0].document
        text = 2 * tokenizer.encode(document, add_special=False)[:half]
        found.append(head_gates(model, params, np.asarray([text], np.int32), sink=sink, local=local))
    return tuple(tuple(map(float, np.mean(layer, axis=0))) for layer in zip(*found, strict=True))
