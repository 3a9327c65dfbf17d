"""The distance against its definition (all costs, a linear programme), its gradient, and the mix with cross-entropy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.special import softmax

from finetune.emo import EmoConfig, cosine_spread, earth_mover, emo, head_directions
from finetune.optimizers import OptimizerConfig
from finetune.state import Constants, full_tuning
from finetune.trainer import summed_loss
from models.errors import InputError
from models.kernels import LowRank
from tests.support.toy_training import toy_batch, toy_model, toy_params, updates

ROWS, WIDTH, IDS = 7, 5, 11
VARIANTS = [EmoConfig(variant=variant, drop_gold=drop_gold) for variant in (1, 2) for drop_gold in (False, True)]


def unit_columns(seed: int, width: int = WIDTH, ids: int = IDS, shift: float = 0.0) -> np.ndarray:
    columns = np.random.default_rng(seed).standard_normal((width, ids)) + shift
    return (columns / np.linalg.norm(columns, axis=0)).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    """(logits f32[N, I], labels i32[N], directions f32[D, I])."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((ROWS, IDS)) * 2, jnp.float32)
    return logits, jnp.asarray(rng.integers(0, IDS, ROWS), jnp.int32), jnp.asarray(unit_columns(2))


def costs(directions) -> np.ndarray:
    found = 1.0 - np.asarray(directions, np.float64).T @ np.asarray(directions, np.float64)
    np.fill_diagonal(found, 0.0)  # float32 columns have length 1 to 1e-7
    return found


def laws(logits) -> np.ndarray:
    return softmax(np.asarray(logits, np.float64), axis=-1)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_distance_is_the_mean_cost_under_the_law(case, shift):
    logits, labels, _ = case
    directions = unit_columns(3, shift=shift)
    expected = (laws(logits) @ costs(directions))[np.arange(ROWS), labels]
    distance, gold = earth_mover(logits, labels, jnp.asarray(directions))
    np.testing.assert_allclose(distance, expected, atol=1e-6)
    np.testing.assert_allclose(gold, laws(logits)[np.arange(ROWS), labels], atol=1e-6)
    assert (np.asarray(distance) >= 0).all() and (np.asarray(distance) <= 2).all()


def test_the_distance_is_the_optimal_transport(case):
    """The least cost over all plans that carry the law to the label, by linear programming."""
    logits, labels, directions = case
    sums_over_targets = np.kron(np.eye(IDS), np.ones((1, IDS)))
    sums_over_sources = np.kron(np.ones((1, IDS)), np.eye(IDS))
    constraints, flat = np.vstack([sums_over_targets, sums_over_sources]), costs(directions).ravel()
    for law, label, distance in zip(laws(logits), labels, earth_mover(*case)[0], strict=True):
        margins = np.concatenate([law / law.sum(), np.eye(IDS)[label]])
        plan = linprog(flat, A_eq=constraints, b_eq=margins, bounds=(0, None))
        assert plan.fun == pytest.approx(float(distance), abs=1e-6)


def test_directions_at_right_angles_leave_the_mass_beside_the_label(case):
    logits, labels, _ = case
    distance, gold = earth_mover(logits, labels, jnp.eye(IDS, dtype=jnp.float32))
    np.testing.assert_allclose(distance, 1.0 - gold, atol=1e-6)


def test_a_sure_model_has_no_distance_and_keeps_its_digits(case):
    """1 - <e_y, sum_i q_i e_i> in float32 would be rounding here."""
    _, labels, directions = case
    logits = 17.0 * jax.nn.one_hot(labels, IDS, dtype=jnp.float32)
    expected = (softmax(np.asarray(logits, np.float64), axis=-1) @ costs(directions))[np.arange(ROWS), labels]
    distance = earth_mover(logits, labels, directions)[0]
    assert (expected < 1e-6).all()
    np.testing.assert_allclose(distance, expected, rtol=1e-4)
    np.testing.assert_array_equal(earth_mover(200.0 * logits, labels, directions)[0], 0.0)


def test_the_gradient_raises_what_is_nearer_to_the_label_than_the_mean(case):
    """The derivative by logit i is q_i (sum_j q_j cos_jy - cos_iy)."""
    logits, labels, directions = case
    law, cosines = laws(logits), 1.0 - costs(directions)[labels]
    expected = law * ((law * cosines).sum(axis=1, keepdims=True) - cosines)
    gradient = jax.grad(lambda x: earth_mover(x, labels, directions)[0].sum())(logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_no_gradient_reaches_the_directions(case):
    logits, labels, directions = case
    for config in VARIANTS:
        per_token = emo(config, directions).per_token
        gradient = jax.grad(lambda d, f=per_token: f(logits, labels, {"embedding": d}, None)[0].sum())(directions)
        np.testing.assert_array_equal(gradient, 0.0)


def test_numbering_the_ids_otherwise_changes_nothing(case):
    logits, labels, directions = case
    order = np.random.default_rng(4).permutation(IDS)
    moved = earth_mover(logits[:, order], jnp.asarray(np.argsort(order)[labels], jnp.int32), directions[:, order])
    np.testing.assert_allclose(moved[0], earth_mover(*case)[0], atol=1e-6)


def test_rows_that_pad_the_vocabulary_play_no_part(case):
    logits, labels, directions = case
    padded = jnp.pad(logits, ((0, 0), (0, 3)), constant_values=9.0)
    np.testing.assert_allclose(earth_mover(padded, labels, directions)[0], earth_mover(*case)[0], atol=1e-6)
    gradient = jax.grad(lambda x: earth_mover(x, labels, directions)[0].sum())(padded)
    np.testing.assert_array_equal(gradient[:, IDS:], 0.0)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_the_mix_has_the_value_and_the_gradient_of_its_formula(case, config):
    """A bracket is a number: the gradient is that of the weighted sum with the weights held."""
    logits, labels, directions = case
    objective = emo(config, directions)
    rows = np.arange(ROWS)
    likelihood = -np.log(laws(logits)[rows, labels])
    distance, gold = (np.asarray(x, np.float64) for x in earth_mover(*case))
    used = distance + gold if config.drop_gold else distance
    weights = (0.5, 0.5 * likelihood / used) if config.variant == 1 else (used / likelihood, 1.0)

    def mixed(x):
        log_law = jax.nn.log_softmax(x, axis=-1)
        parts = -log_law[rows, labels], earth_mover(x, labels, directions)[0]
        return sum(
            jnp.sum(jnp.asarray(weight, jnp.float32) * part) for weight, part in zip(weights, parts, strict=True)
        )

    def loss(x):
        return objective.per_token(x, labels, objective.constants, None)[0].sum()

    value, figures = objective.per_token(logits, labels, objective.constants, None)
    np.testing.assert_allclose(value, likelihood if config.variant == 1 else 2 * used, rtol=1e-5)
    np.testing.assert_allclose(figures["cross_entropy"], likelihood, rtol=1e-5)
    np.testing.assert_allclose(figures["emo"], distance, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(logits), jax.grad(mixed)(logits), atol=1e-5)


def test_a_bracket_has_a_limit(case):
    logits, labels, directions = case
    objective = emo(EmoConfig(max_ratio=0.25), directions)
    value, figures = objective.per_token(logits, labels, objective.constants, None)
    ratio = np.minimum(np.asarray(figures["cross_entropy"] / figures["emo"]), 0.25)
    assert (ratio == 0.25).any()
    np.testing.assert_allclose(value, 0.5 * (figures["cross_entropy"] + ratio * figures["emo"]), rtol=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("scale", [-300.0, 0.0, 15.0, 300.0])
def test_values_and_gradients_stay_in_bounds_however_sure_the_model(case, config, scale):
    _, labels, directions = case
    logits = scale * jax.nn.one_hot(labels, IDS, dtype=jnp.float32)
    objective = emo(config, directions)
    loss = jax.value_and_grad(lambda x: objective.per_token(x, labels, objective.constants, None)[0].sum())
    value, gradient = loss(logits)
    assert 0.0 <= value < ROWS * 305 and jnp.abs(gradient).max() < 20.0


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_rounding_below_a_distance_of_0_does_not_turn_the_gradient_round(case, config):
    """The model is sure of an id in the label's own direction, and float32 makes that direction a little too long."""
    label, twin, directions = jnp.zeros(1, jnp.int32), 1, case[2]
    objective = emo(config, directions.at[:, twin].set(directions[:, 0] * (1.0 + 1e-5)))
    logits = 15.0 * jax.nn.one_hot(jnp.full(1, twin), IDS, dtype=jnp.float32)
    assert earth_mover(logits, label, objective.constants["embedding"])[0] < 0
    gradient = jax.grad(lambda x: objective.per_token(x, label, objective.constants, None)[0].sum())(logits)
    assert (gradient[:, 2:] > 0).all(), "ids far from the label are to be lowered"


def test_directions_are_the_head_as_it_was_loaded(tiny):
    model, params = tiny
    head = np.asarray(params["unembedding"]["kernel"])
    found = head_directions(model.config, params, 50)
    np.testing.assert_allclose(found, (head / np.linalg.norm(head, axis=0))[:, :50], rtol=1e-5)
    tied = dataclasses.replace(model.config, tied_embeddings=True)
    table = params["embedding"]["embedding"].at[:, 3].set(0.0)
    found = head_directions(tied, {"embedding": {"embedding": table}}, 61)
    np.testing.assert_array_equal(found[:, 3], 0.0)
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=0)[4:], 1.0, rtol=1e-5)
    low_rank = LowRank(params["unembedding"]["kernel"], jnp.ones((32, 1)), None, jnp.ones((1, 61)))
    found = head_directions(model.config, {"unembedding": {"kernel": low_rank}}, 61)
    np.testing.assert_allclose(found, (head + 1) / np.linalg.norm(head + 1, axis=0), rtol=1e-4, atol=1e-6)


def test_the_spread_of_cosines_is_that_of_all_pairs():
    directions = unit_columns(5, shift=0.7)
    pairs = (directions.T @ directions)[~np.eye(IDS, dtype=bool)]
    np.testing.assert_allclose(cosine_spread(jnp.asarray(directions)), (pairs.mean(), pairs.std()), rtol=1e-4)
    assert cosine_spread(jnp.ones((1, 4))) == pytest.approx((1.0, 0.0))
    assert cosine_spread(jnp.ones((1, 60_000))) == pytest.approx((1.0, 0.0))  # more pairs than an int32 counts


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="variant must be 1 or 2, got 3"):
        EmoConfig(variant=3)
    with pytest.raises(InputError, match="max_ratio must be above 0"):
        EmoConfig(max_ratio=0.0)


def test_training_lowers_both_losses():
    """Each is logged, as the value of this variant follows the distance alone."""
    objective = emo(EmoConfig(variant=2), head_directions(toy_model().config, toy_params(), 50))
    method = full_tuning(jax.tree.map(lambda value: value.dtype, toy_params()))
    config = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup=0)
    constants = Constants({}, {}, objective.constants)
    _, metrics, _ = updates(method, constants, toy_params(), [toy_batch()] * 20, config, objective)
    for name in ("cross_entropy", "emo"):
        assert metrics[-1][name] < 0.7 * metrics[0][name]


def test_chunks_and_padding_do_not_matter():
    objective = emo(EmoConfig(), head_directions(toy_model().config, toy_params(), 50))

    @functools.partial(jax.jit, static_argnums=1)
    def figures(batch, chunk):
        return summed_loss(toy_model(), objective, toy_params(), objective.constants, batch, chunk)[1]

    batch = jax.tree.map(lambda value: value[0], toy_batch())
    batch = batch.replace(targets=batch.targets & (batch.segments > 0))
    other_padding = batch.replace(tokens=jnp.where(batch.segments == 0, 7, batch.tokens))
    whole = figures(batch, 256)
    for other in (figures(batch, 5), figures(other_padding, 256)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other, whole)
