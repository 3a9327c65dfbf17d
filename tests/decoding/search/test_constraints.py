"""N-gram blocking and starts against plain loops, and what searches write under them."""

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.search.constraints import begun, repeated
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, forward, texts
from tests.support.search_reference import check_scores, hypotheses, log_probs

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


def best_allowed(model, params, prompt, num, n=0, starts=()):
    """Greedy under constraints by whole passes and plain loops over all tokens."""
    text = []
    while len(text) < num:
        known = [*prompt, *text]
        padded = np.array([known + [0] * (64 - len(known))], np.int32)
        order = np.argsort(-np.asarray(forward(model, params, padded))[0, len(known) - 1], kind="stable")
        grams = {tuple(known[i : i + n]) for i in range(len(known) - n + 1)} if n else set()

        def fits(token, known=known, grams=grams):
            begins = not starts or any([*text, token][: len(start)] == list(start)[: len(text) + 1] for start in starts)
            return begins and (not n or tuple([*known, token][-n:]) not in grams)

        allowed = [int(token) for token in order if fits(int(token))]
        if not allowed:
            break
        text.append(allowed[0])
    return text


@pytest.fixture(scope="module")
def constrained_greedy(tiny):
    options = {"no_repeat_ngram": 2, "starts": STARTS, "return_scores": True}
    return make_decode_fn(tiny[0], "greedy", max_new_tokens=ROOM, **options)


def test_greedy_text_under_constraints_and_its_scores(tiny, constrained_greedy):
    output = constrained_greedy(tiny[1], PROMPTS)
    assert texts(output) == [best_allowed(*tiny, prompt, ROOM, 2, STARTS) for prompt in PROMPTS]
    assert hypotheses(output.found, 0) == texts(output)[:1]
    check_scores(*tiny, output.found, 0.0)
    free = make_decode_fn(tiny[0], "greedy", max_new_tokens=ROOM)(tiny[1], PROMPTS)
    assert free.found is None and texts(free) != texts(output)


def test_sampling_under_constraints(tiny, constrained_greedy):
    options = {"no_repeat_ngram": 2, "starts": STARTS, "return_scores": True}
    sample = make_decode_fn(tiny[0], "sample", max_new_tokens=ROOM, **options)
    cold = sample(tiny[1], PROMPTS, temperature=0.0)
    assert texts(cold) == texts(constrained_greedy(tiny[1], PROMPTS))
    hot = sample(tiny[1], PROMPTS, 3, temperature=1.5)
    check_scores(*tiny, hot.found, 0.0)
    for prompt, text in zip(PROMPTS, texts(hot), strict=True):
        assert any(text[: len(start)] == list(start) for start in STARTS)
        grams = [tuple(([*prompt, *text])[i : i + 2]) for i in range(len(prompt) + len(text) - 1)]
        new = grams[max(len(prompt) - 1, 0) :]
        assert len(set(new)) == len(new) and not set(new) & set(grams[: max(len(prompt) - 1, 0)])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_contrastive_search_takes_no_token_that_is_forbidden(tiny, alpha):
    """However few are left of its candidates, and however unlike they are."""
    fn = make_decode_fn(tiny[0], "contrastive", max_new_tokens=3, starts=((7, 8, 9), (7, 5, 9)), alpha=alpha)
    assert all(text in ([7, 8, 9], [7, 5, 9]) for text in texts(fn(tiny[1], PROMPTS)))


@pytest.mark.parametrize("method", ["contrastive", "beam", "diverse_beam"])
def test_a_text_of_a_search_without_a_token_left_ends(tiny, method):
    fn = make_decode_fn(tiny[0], method, max_new_tokens=ROOM, no_repeat_ngram=1, starts=((7, 7),))
    output = fn(tiny[1], [[1, 2], [7], [3]])
    assert texts(output) == [[7], [], [7]]


def test_constrained_text_is_not_labelled_exact(tiny):
    assert make_decode_fn(tiny[0], "greedy").label == "exact"
    assert make_decode_fn(tiny[0], "greedy", return_scores=True).label == "exact"
    assert make_decode_fn(tiny[0], "greedy", no_repeat_ngram=2).label == "lossy"


def test_a_row_without_a_token_left_ends(tiny):
    starts = ((7, 7),)  # which a rule against repetition forbids
    fn = make_decode_fn(tiny[0], "greedy", max_new_tokens=ROOM, no_repeat_ngram=1, starts=starts, return_scores=True)
    output = fn(tiny[1], [[1, 2], [7], [3]])
    assert texts(output) == [[7], [], [7]]
    assert np.isneginf(output.found.scores[1, 0]) and np.isfinite(output.found.scores[0, 0])


@pytest.mark.parametrize("method", ["greedy", "sample", "beam", "contrastive"])
def test_constraints_that_cannot_be(tiny, method):
    for options, message in (
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be 0"),
        ({"starts": [[]]}, "empty list"),
        ({"starts": [[61]]}, "the model has ids 0 to 60"),
        ({"starts": ["ab"]}, "encode text first"),
    ):
        with pytest.raises(InputError, match=message):
            make_decode_fn(tiny[0], method, **options)
