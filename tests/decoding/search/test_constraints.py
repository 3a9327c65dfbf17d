"""N-gram blocking and starts against plain loops, and what searches write under them."""

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.search.constraints import begun, repeated
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, texts
from tests.support.search_reference import hypotheses, log_probs

STARTS = ((5, 9, 1), (5, 9, 30, 2), (7,), (40, 41))
LOOPING = [[4, 8, 4, 8, 4], [1], [6, 6, 6], [3, 5, 7, 3, 5]]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_repeated_ngrams(n):
    rng = np.random.default_rng(n)
    text, lengths = rng.integers(0, 2, (3, 2, 12)), np.array([[0, 1], [2, 12], [7, 9]])
    wanted = np.zeros((3, 2, 5), bool)
    for row, own, token in np.ndindex(wanted.shape):
        known = text[row, own, : lengths[row, own]].tolist()
        grams = [known[i : i + n] for i in range(len(known) - n + 1)]
        wanted[row, own, token] = len(known) >= n - 1 and [*known[len(known) - n + 1 :], token] in grams
    found = repeated(jnp.asarray(text, jnp.int32), jnp.asarray(lengths, jnp.int32), n, 5)
    np.testing.assert_array_equal(found, wanted)
    assert wanted.any() and not wanted.all()


def test_what_may_follow_a_beginning():
    cases = {(): {5, 7, 40}, (5,): {9}, (5, 9): {1, 30}, (5, 9, 30): {2}, (40,): {41}, (6,): set()}
    free = [(7,), (7, 50), (5, 9, 1), (5, 9, 1, 3), (5, 9, 30, 2, 2), (40, 41, 0)]
    rows = [*cases, *free]
    text = np.array([[*row, *[0] * (6 - len(row))] for row in rows], np.int32)[:, None]
    lengths = jnp.asarray([[len(row)] for row in rows], jnp.int32)
    found = np.asarray(begun(jnp.asarray(text), lengths, STARTS, 61))[:, 0]
    for row, allowed in zip(rows, found, strict=True):
        assert set(np.flatnonzero(allowed).tolist()) == cases.get(row, set(range(61))), row


@pytest.mark.parametrize(
    ("method", "options"),
    [("beam", {}), ("diverse_beam", {"groups": 2, "strength": 0.5}), ("contrastive", {"alpha": 0.3})],
)
def test_searches_keep_to_their_constraints(tiny, method, options):
    model, params = tiny
    prompts = [*PROMPTS[:4], *LOOPING]
    options = {**options, "no_repeat_ngram": 2, "starts": [list(start) for start in STARTS]}
    options |= {} if method == "contrastive" else {"width": 4, "num_return": 4}
    output = make_decode_fn(model, method, max_new_tokens=ROOM, **options)(params, prompts)
    for row, prompt in enumerate(prompts):
        found = [texts(output)[row]] if output.found is None else hypotheses(output.found, row)
        for index, text in enumerate(found):
            assert any(tuple(text[: len(start)]) == start for start in STARTS)
            new = list(zip([prompt[-1], *text], text, strict=False))
            assert len(new) == len(set(new)) == ROOM
            assert not set(new) & set(zip(prompt, prompt[1:], strict=False))
            if output.found is not None:
                score = output.found.log_probs[row, index]
                np.testing.assert_allclose(score, log_probs(model, params, prompt, text).sum(), atol=1e-3)


def test_a_closed_list_of_answers_is_searched_whole(tiny):
    """Answers that end in a stop token: the search finds the likeliest, in order."""
    model, params = tiny
    answers = [[11, 4, 0], [11, 5, 0], [20, 0], [33, 8, 9, 0]]
    fn = make_decode_fn(
        model, "beam", max_new_tokens=ROOM, width=4, num_return=4, stop_tokens=[0], starts=answers, length_penalty=0.0
    )
    found = fn(params, PROMPTS).found
    for row, prompt in enumerate(PROMPTS):
        sums = [log_probs(model, params, prompt, answer).sum() for answer in answers]
        assert hypotheses(found, row) == [answers[index] for index in np.argsort(sums)[::-1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be 0"),
        ({"starts": [[]]}, "empty list"),
        ({"starts": ["yes"]}, "starts must be lists of token ids"),
        ({"starts": [[3, 61]]}, r"starts has token ids \(3, 61\), but the model has ids 0 to 60"),
    ],
)
@pytest.mark.parametrize("method", ["beam", "diverse_beam", "contrastive"])
def test_options_that_cannot_be(tiny, method, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(tiny[0], method, **options)
