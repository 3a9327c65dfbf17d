"""ASAp on languages whose law is known by enumeration, and one bug that the test of the law sees."""

import functools
import itertools

import numpy as np
import pytest

from decoding.grammar import GrammarAligned, Vocabulary, regex
from decoding.grammar.asap import Trie
from models.errors import InputError
from tests.support.decode_reference import forward, small_law_model, softmax

VOCABULARY = Vocabulary([b"0", b"1", b"ab", b"c", None])
STOP, ROOM = 4, 6
PATTERN = "00000|1[01]{4}"  # behind 0 there is one text, behind 1 there are sixteen
DRAWS = 12_000


@functools.cache
def law(text: tuple[int, ...]) -> np.ndarray:
    """Returns f64[V], the law behind a text: 0 is likely first, the rest is drawn at random."""
    rng = np.random.default_rng([5, *text, len(text)])
    found = rng.dirichlet([1.0] * 5)
    return np.array([0.85, 0.05, 0.04, 0.03, 0.03]) if not text else found


def language() -> list[tuple[int, ...]]:
    texts = [(0,) * 5, *((1, *rest) for rest in itertools.product((0, 1), repeat=4))]
    return [(*text, STOP) for text in texts]


def target() -> dict[tuple[int, ...], float]:
    """Returns the true law of texts, given the language."""
    mass = {text: np.prod([law(text[:i])[token] for i, token in enumerate(text)]) for text in language()}
    return {text: float(x / sum(mass.values())) for text, x in mass.items()}


def new_trie(kind=Trie) -> Trie:
    matcher = regex(PATTERN, VOCABULARY).matcher()
    return kind(matcher, lambda text: law(tuple(text)), [STOP], ROOM)


def distance(samples, truth) -> float:
    """Returns the total variation between accepted samples and a law."""
    kept = [tuple(sample.tokens) for sample in samples if sample.accepted]
    assert set(kept) <= set(truth)
    counts = {text: kept.count(text) / len(kept) for text in set(kept)}
    return 0.5 * sum(abs(counts.get(text, 0.0) - p) for text, p in truth.items())


class NeverLearns(Trie):
    """Plain constrained decoding: all bounds stay 1."""

    def _learn(self, path, rows):
        path[-1].bound = 1.0


class LearnsOfAllowedTokens(Trie):
    """A planted bug: probabilities among the allowed tokens in place of the model's own."""

    def row(self, node, text):
        tokens, found = super().row(node, text)
        return tokens, found / found.sum()


@pytest.mark.parametrize(("kind", "right"), [(Trie, True), (NeverLearns, False), (LearnsOfAllowedTokens, False)])
def test_samples_tend_to_the_true_law(kind, right):
    trie, rng = new_trie(kind), np.random.default_rng(3)
    for _ in range(300):
        trie.sample(rng)
    samples = [trie.sample(rng) for _ in range(DRAWS)]
    found = distance(samples, target())
    assert found < 0.02 if right else found > 0.2
    assert sum(sample.calls for sample in samples) < 20 or not right, "the trie answers where it has been"


def test_bounds_fall_to_the_chance_of_ending_inside():
    trie, rng, bounds = new_trie(), np.random.default_rng(0), [1.0]
    for _ in range(3000):
        trie.sample(rng)
        bounds.append(trie.root.bound)
    exact = sum(np.prod([law(text[:i])[token] for i, token in enumerate(text)]) for text in language())
    assert (np.diff(bounds) <= 1e-15).all() and bounds[-1] >= exact * (1 - 1e-12)
    np.testing.assert_allclose(bounds[-1], exact, rtol=2e-3)


def test_the_first_sample_is_one_of_plain_constrained_decoding():
    for seed in range(30):
        first = [new_trie(kind).sample(np.random.default_rng(seed)).tokens for kind in (Trie, NeverLearns)]
        assert first[0] == first[1]


def test_texts_that_are_too_long_and_dead_ends_count_as_outside():
    endless = Trie(regex("[01]*", VOCABULARY).matcher(), lambda text: law(tuple(text)), [STOP], 2)
    rng = np.random.default_rng(0)
    samples = [endless.sample(rng) for _ in range(400)]
    assert {len(sample.tokens) for sample in samples if not sample.accepted} == {2}
    assert all(sample.accepted for sample in samples[-100:]), "what was too long has lost all weight"
    assert {tuple(sample.tokens) for sample in samples[-300:]} == {(STOP,), (0, STOP), (1, STOP)}


def test_a_model_answers_as_whole_passes_do():
    model, params = small_law_model()
    sampler = GrammarAligned(
        model, params, [2, 0, 3], regex(PATTERN, VOCABULARY), stop_tokens=[STOP], max_new_tokens=ROOM, temperature=0.7
    )
    for text in ([], [0], [0, 0], [1], [1, 0, 1], [1, 1], [1, 1], [0, 0, 0, 0, 0], []):
        row = np.array([[2, 0, 3, *text, *[0] * (8 - len(text))]], np.int32)
        whole = softmax(np.asarray(forward(model, params, row))[0, 2 + len(text)].astype(np.float64) / 0.7)
        np.testing.assert_allclose(sampler.trie.law(text), whole, atol=1e-5)
    samples = sampler.samples(20, rng=1)
    assert all(regex(PATTERN, VOCABULARY).accepts(s.tokens[:-1]) for s in samples if s.accepted)
    assert samples[0].calls > 0 and sampler.samples(5, rng=1)[0].calls < samples[0].calls


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stop_tokens": []}, "pass stop_tokens"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 65}, "context"),
    ],
)
def test_settings_that_cannot_be(change, told):
    model, params = small_law_model()
    settings = {"stop_tokens": [STOP], "max_new_tokens": ROOM, **change}
    with pytest.raises(InputError, match=told):
        GrammarAligned(model, params, [1], regex(PATTERN, VOCABULARY), **settings)
