"""Ranks by hand, rankings against a slow loop, and a decoder that goes on as it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from finetune.code_measures import HeldOut, completion, held_out, ranked, retrieval, writing
from finetune.code_pairs import code_pairs
from finetune.code_tokenizer import code_tokenizer
from finetune.corpus import Example
from finetune.denoising import special_tokens
from models.alone import decoder_alone
from models.encoder_decoder import init_params, with_start
from models.errors import InputError
from tests.support.code_training import tiny_bimodal

SPECIALS = special_tokens(code_tokenizer(), ("cls", "clm", "match", "code", "end"))


@pytest.fixture(scope="module")
def case():
    """(model, parameters that are far from zero, 6 pairs of which two have one function)."""
    model = tiny_bimodal()
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)
    pairs = held_out(code_tokenizer(), code_pairs(6, 5, True), 60, 120)
    pairs.codes[3] = list(pairs.codes[1])
    return model, params, pairs


def test_ranks_by_hand():
    scores = np.array([[0.9, 0.5, 0.1], [0.7, 0.2, 0.3], [0.4, 0.4, 0.4]])
    figures = ranked("", scores, np.eye(3, dtype=bool))
    assert figures["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3) and figures["recall"] == pytest.approx(1 / 3)
    assert figures["recall/error"] == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    both = ranked("x/", scores, np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool))
    assert both["x/recall"] == pytest.approx(2 / 3)


def test_rankings_are_those_of_a_slow_loop(case):
    model, params, pairs = case
    figures = retrieval(model, params, pairs, SPECIALS, top=6)

    @jax.jit
    def vector(tokens, length):
        return model.apply({"params": params}, tokens, length, method="embed_text")[0]

    @jax.jit
    def match(text, lengths, code, ends):
        encoded = model.apply({"params": params}, text, lengths, method="encode")
        return model.apply({"params": params}, code, ends, encoded, method="match")[0, 1]

    def row(first, tokens):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens) + 1] = [first, *tokens]
        return jnp.asarray(padded), jnp.array([len(tokens) + 1], jnp.int32)

    texts, codes = ([vector(*row(SPECIALS.cls, one)) for one in side] for side in pairs)
    cosines = np.array([[float(t @ c) for c in codes] for t in texts])
    logits = np.array(
        [[float(match(*row(SPECIALS.cls, t), *row(SPECIALS.match, c))) for c in pairs.codes] for t in pairs.texts]
    )
    for prefix, scores in (("", cosines), ("reranked/", cosines + logits)):
        ranks = []
        for place in range(6):
            own = [i for i in range(6) if pairs.codes[i] == pairs.codes[place]]
            best = max(scores[place][i] for i in own)
            ranks.append(1 + sum(scores[place][i] > best for i in range(6) if i not in own))
        assert figures[f"{prefix}mrr"] == pytest.approx(np.mean(1 / np.array(ranks)))
    assert figures["mrr"] != figures["reranked/mrr"]


def test_what_the_model_writes_itself_it_writes_exactly(case):
    model, params, pairs = case
    decode = make_decode_fn(with_start(model, SPECIALS.code), max_new_tokens=12, stop_tokens=(SPECIALS.end,))
    out = decode(params, pairs.texts)
    own = [np.asarray(out.tokens[row][: out.lengths[row]]).tolist() for row in range(6)]
    own = [row if row[-1] == SPECIALS.end else [*row, SPECIALS.end] for row in own]
    theirs = [[*row[:-2], (row[-2] + 1) % 600, row[-1]] if row[:-1] else [7, SPECIALS.end] for row in own]
    figures = writing(model, params, HeldOut(pairs.texts, own), SPECIALS, 6, 12)
    assert figures["exact"] == 1 and np.isfinite(figures["cross_entropy"])
    assert writing(model, params, HeldOut(pairs.texts, theirs), SPECIALS, 6, 12)["exact"] == 0


def test_a_decoder_alone_goes_on_as_it_does(case):
    model, params, pairs = case
    tokenizer = code_tokenizer()
    alone, kept = decoder_alone(model, params, SPECIALS.clm)
    lines = [[*tokenizer.encode(f"def solve(x{k}):\n")] for k in range(3)]
    decode = make_decode_fn(alone, max_new_tokens=8, stop_tokens=(SPECIALS.end,))
    out = decode(kept, [[model.config.start_token, *line] for line in lines])
    more = [[t for t in np.asarray(out.tokens[row][: out.lengths[row]]).tolist()] for row in range(3)]
    codes = [[*line, *row] if row[-1] == SPECIALS.end else [*line, *row, SPECIALS.end]
             for line, row in zip(lines, more, strict=True)]  # fmt: skip
    figures = completion(model, params, HeldOut(pairs.texts[:3], codes), SPECIALS, tokenizer, 3, 8)
    wanted = ["\n" not in tokenizer.decode(row) for row in more]  # else another line is asked for
    assert figures["completed"] >= sum(wanted) / 3 and any(wanted)
    other = [[*line, 400, SPECIALS.end] if row[0] != 400 else [*line, 401, SPECIALS.end]
             for line, row in zip(lines, more, strict=True)]  # fmt: skip
    assert completion(model, params, HeldOut(pairs.texts[:3], other), SPECIALS, tokenizer, 3, 8)["completed"] == 0


def test_pairs_that_are_too_long_are_left_out():
    examples = [*code_pairs(3, 5, True), Example("x " * 300, "def solve():\n    return 1")]
    found = held_out(code_tokenizer(), examples, 60, 120)
    assert len(found.texts) == len(found.codes) == 3 and all(code[-1] == SPECIALS.end for code in found.codes)
    with pytest.raises(InputError, match="0 of 4 pairs have at most 3 and 120 tokens"):
        held_out(code_tokenizer(), examples, 3, 120)
