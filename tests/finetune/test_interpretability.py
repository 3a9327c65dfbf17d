"""Measures of neurons: a planted feature is found and a shuffled one is not; codes are those of one wide MLP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from finetune.interpretability import Codes, coverage, detection, hidden_codes, reconstruction, sparsity
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, MoEConfig
from models.decoder import Decoder
from models.errors import InputError
from models.moe import sparsity_scores

RNG = np.random.default_rng(0)
HELD = RNG.random((4000, 6)) < np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.05])


def planted(held, noise=0.0, seed=1):
    """Features: one for each property, that fires at it with a strength of 1 to 2, and as many of nothing."""
    rng = np.random.default_rng(seed)
    strength = np.where(held, rng.uniform(1, 2, held.shape), noise * rng.random(held.shape))
    return np.concatenate([strength, np.maximum(rng.normal(size=held.shape), 0)], axis=1).astype(np.float32)


def shuffled(values, seed=2):
    return np.random.default_rng(seed).permutation(values)


class TestCoverage:
    def test_by_hand(self):
        """Of feature 0 the firings are the property and one more: F1 4/5; above half its greatest value one is left."""
        features = np.array([[2.0], [0.5], [0.5], [0.0]], np.float32)
        held = np.array([[True], [True], [False], [False]])
        assert coverage(features, held, (0.0,)) == (pytest.approx(0.8), 0.0)
        assert coverage(features, held, (0.5,)) == (pytest.approx(2 / 3), 0.5)
        assert coverage(features, held) == (pytest.approx(0.8), 0.0)

    def test_the_best_feature_of_each_property_counts_and_the_level_is_one_for_all(self):
        features = np.array([[4, 1, 0], [3, 0, 0], [1, 0, 0], [0, 4, 0]], np.float32)
        held = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]], bool)  # the last property never holds
        assert coverage(features, held, (0.0,)).value == pytest.approx((4 / 5 + 2 / 3) / 2)
        assert coverage(features, held, (0.0, 0.5)) == (1.0, 0.5)

    def test_planted_features_are_found_and_shuffled_ones_are_not(self):
        features = planted(HELD, noise=0.9)  # fires everywhere, but more strongly at the property
        assert coverage(features, HELD).value == 1.0 and coverage(features, HELD).level == 0.5
        control, share = coverage(features, shuffled(HELD)), HELD.mean(axis=0)
        always_on = (2 * share / (1 + share)).mean()  # what a feature has that is on everywhere
        assert control.value == pytest.approx(always_on, abs=0.02)

    def test_a_feature_that_never_fires_is_never_on(self):
        held = np.ones((4, 1), bool)
        assert coverage(-np.ones((4, 1), np.float32), held).value == 0.0
        with pytest.raises(InputError, match="none of the properties holds"):
            coverage(np.ones((4, 1), np.float32), ~held)


class TestReconstruction:
    def test_planted_features_tell_all_and_shuffled_ones_nothing(self):
        train, test = (planted(HELD), HELD), (planted(HELD[::-1], seed=3), HELD[::-1])
        assert reconstruction(train, test) == (1.0, 0.0, None)
        assert reconstruction((train[0], shuffled(HELD)), test).f1 == 0.0

    @pytest.mark.parametrize(("wrong", "found"), [(1, True), (2, False)])
    def test_a_feature_must_be_right_in_19_of_20_firings(self, wrong, found):
        features = np.ones((20, 1), np.float32)
        held = np.arange(20)[:, None] >= wrong
        assert (reconstruction((features, held), (features, held), levels=(0.0,)).f1 > 0) == found

    @pytest.mark.parametrize(("firings", "found"), [(10, True), (9, False)])
    def test_a_feature_must_fire_ten_times(self, firings, found):
        held = np.arange(30)[:, None] < firings
        features = held.astype(np.float32)
        assert (reconstruction((features, held), (features, held), levels=(0.0,)).f1 > 0) == found

    def test_any_feature_is_enough_and_two_owners_of_a_square_are_a_conflict(self):
        """Properties: squares 0 and 1 of one player, then of the other. Two features each tell half of property 0."""
        held = np.zeros((40, 4), bool)
        held[:20, 0] = held[20:, 2] = True
        features = np.stack([np.arange(40) < 10, (np.arange(40) >= 10) & (np.arange(40) < 20), np.arange(40) >= 20], 1)
        features = features.astype(np.float32)
        assert reconstruction((features, held), (features, held), kinds=2, levels=(0.0,)) == (1.0, 0.0, 0.0)
        features_now = features.copy()
        features_now[:8, 2] = 1  # on these tokens both owners of square 0 are told: 8 of 40 tokens, one of two squares
        found = reconstruction((features, held), (features_now, held), kinds=2, levels=(0.0,))
        assert found.conflicts == pytest.approx(8 / 80) and found.f1 == pytest.approx(2 * 40 / (48 + 40))


class TestDetection:
    def test_planted_features_are_found_by_their_explanation_and_shuffled_ones_by_chance(self):
        common = HELD[:, :4]
        train = planted(common)[:, :4], common
        test = planted(common[::-1], seed=3)[:, :4], common[::-1]
        assert detection(train, test) == (1.0, 0.0, 4)
        control = detection(train, (test[0], shuffled(test[1])))
        assert control.accuracy == pytest.approx(0.5, abs=0.1)

    def test_by_hand(self):
        """A feature fires at all tokens of one property, and as often without: half of its firings are found."""
        held = np.tile([[True], [False], [False], [False]], (500, 1))
        features = np.tile([[1.0], [2.0], [0.0], [0.0]], (500, 1)).astype(np.float32)
        assert detection((features, held), (features, held)).accuracy == pytest.approx(0.75)

    def test_each_tenth_of_the_strengths_counts_alike(self):
        """The property holds in the strongest tenth of the firings alone: 10 of 100 of these are found."""
        strengths = np.concatenate([np.arange(1, 1001), np.zeros(1000)]).astype(np.float32)[:, None]
        held = strengths > 900
        assert detection((strengths, held), (strengths, held)).accuracy == pytest.approx((0.1 + 1.0) / 2)

    def test_too_few_tokens(self):
        few = HELD.astype(np.float32)[:50], HELD[:50]
        assert detection((HELD.astype(np.float32), HELD), few) == (0.5, 0.0, 0)


def tiny(mlp):
    block = BlockConfig(AttentionConfig(2, 1, 8), mlp)
    model = Decoder(DecoderConfig("llama", 31, 16, (block,) * 2, 16))
    params = model.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    return model, jax.tree.map(lambda w: 10 * w, params)


TEXTS = [[1, 2, 3, 4, 5], [7, 8, 9], [4, 4, 4, 4]]


def test_codes_of_a_mixture_are_those_of_one_wide_mlp_whatever_its_form():
    mixture = MoEConfig(4, 2, MLPConfig(8, "relu", gated=False), router="sparsity", form="loop")
    model, params = tiny(mixture)
    codes = hidden_codes(model, params, TEXTS, 1, first=1)
    assert codes.features.shape == (9, 32) and codes.scores.shape == codes.fired.shape == (9, 4)
    blocks = codes.features.reshape(9, 4, 8)
    assert ((blocks != 0).any(axis=-1).sum(axis=1) <= 2).all()

    hidden = model.apply({"params": params}, jnp.array(TEXTS[:1]), collect=(1, 2)).hidden
    layer = params["layers_1"]
    nothing = {**layer["mlp"], "experts_down": 0 * layer["mlp"]["experts_down"]}
    attention_only = {**params, "layers_1": {**layer, "mlp": nothing}}
    before = model.apply({"params": attention_only}, jnp.array(TEXTS[:1]), collect=(2,)).hidden[2]
    out = codes.features[:4] @ np.asarray(layer["mlp"]["experts_down"]).reshape(32, 16)
    np.testing.assert_allclose(out, (hidden[2] - before)[0, 1:], atol=1e-4)

    x = np.asarray(before[0, 1:], np.float64)
    x = (x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)).astype(np.float32)
    up = np.asarray(layer["mlp"]["experts_up"])
    np.testing.assert_array_equal(codes.fired[:4], (np.einsum("nd,edf->nef", x, up) > 0).sum(-1))
    np.testing.assert_allclose(codes.scores[:4], sparsity_scores(jnp.asarray(x), jnp.asarray(up)), atol=1e-4)
    assert sparsity(codes, 2)["score_vs_fired"] < -0.5


def test_codes_of_a_dense_layer():
    model, params = tiny(MLPConfig(8, "relu", gated=False))
    codes = hidden_codes(model, params, TEXTS, 0)
    assert codes.features.shape == (12, 8) and codes.scores is None and codes.fired is None
    apart = hidden_codes(model, params, TEXTS[2:], 0)
    np.testing.assert_allclose(codes.features[8:], apart.features, atol=1e-6)
    with pytest.raises(InputError, match="layer must be 0 to 1, got 2"):
        hidden_codes(model, params, TEXTS, 2)


def test_sparsity_by_hand():
    features = np.array([[1, 0, 0, 0], [2, 0, -1, 0], [0, 0, 0, 3]], np.float32)
    assert sparsity(Codes(features), 0) == {"l0": pytest.approx(4 / 3), "dead": 0.5}
    scores = np.array([[0.3, 0.2, 0.1], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]], np.float32)
    found = sparsity(Codes(features, scores, -2 * scores), 1)
    assert found["score_vs_fired"] == pytest.approx(-1.0)
    assert (found["load_least"], found["load_most"]) == (0.0, pytest.approx(2 / 3))
