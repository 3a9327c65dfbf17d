"""Labels by their law, the loss by its minimum, training by what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from decoding import WithDraft
from decoding.prefill import pad_prompts
from finetune.acceptance_head import (
    Features,
    TrainConfig,
    acceptance,
    binary_kl,
    calibration_error,
    collect,
    label,
    loss,
    scores,
    train,
    unweighted,
)
from models.acceptance_head import AcceptanceHead, read_hidden
from models.errors import InputError
from tests.support.decode_reference import forward, small_law_model

ROWS, NUM = 4000, 3
PROMPTS = [[2, 0, 3], [1, 4]]
TEXT = [[0, 2, 1], [3, 3, 0]]


def off_draft(params):
    """The target with other unembeddings: a draft that is often wrong."""
    noise = jax.random.normal(jax.random.key(9), params["unembedding"]["kernel"].shape)
    return {**params, "unembedding": {"kernel": params["unembedding"]["kernel"] + noise}}


@pytest.fixture(scope="module")
def labelled():
    """(hidden, accept, counted) of many rows that read one of two texts, and the two models' parameters."""
    model, params = small_law_model()
    both = WithDraft(params, off_draft(params))
    prompts = pad_prompts(PROMPTS * (ROWS // 2), model.config.vocab_size)
    text = np.tile(np.array(TEXT, np.int32), (ROWS // 2, 1))
    keys = jax.random.split(jax.random.key(0), ROWS)
    lengths = np.tile(np.array([3, 2], np.int32), ROWS // 2)
    found = label(model, model, both, prompts, text, lengths, keys, jnp.float32(0.3))
    return [np.asarray(x) for x in found], both


def laws(params, row: int) -> np.ndarray:
    """f64[NUM, V]: the laws behind the text's places, from a plain forward pass."""
    model, _ = small_law_model()
    logits = forward(model, params, np.array([PROMPTS[row] + TEXT[row]], np.int32))[0]
    return np.asarray(jax.nn.softmax(logits), np.float64)[len(PROMPTS[row]) - 1 : -1]


def test_labels_are_probabilities_with_the_right_mean(labelled):
    """The mean of min(1, p / q) over Y ~ q is sum min(p, q) = 1 - TV(p, q)."""
    (_, accept, _), both = labelled
    assert (accept > 0).all() and (accept <= 1).all() and (accept == 1).any() and (accept < 0.9).any()
    for row in range(2):
        p, q = laws(both.target, row), laws(both.draft, row)
        exact = np.minimum(p, q).sum(axis=1)
        assert (exact < 0.95).all(), "the models must differ"
        mean, error = accept[row::2].mean(axis=0), accept[row::2].std(axis=0) / np.sqrt(ROWS / 2)
        assert (np.abs(mean - exact) < 4 * error).all()
        wrong = np.minimum(p, q[::-1]).sum(axis=1)
        assert (np.abs(mean - wrong) > 10 * error).any(), "the test must see laws of other places"


def test_places_that_count(labelled):
    (_, _, counted), _ = labelled
    assert not counted[1::2, 2].any(), "behind a text's end"
    assert counted[::2].mean() == pytest.approx(0.7, abs=0.02), "30 % read the target's token"


def test_hidden_states_are_of_the_mixed_text(labelled):
    """The first place's hidden state is that of prompt + Y: one of V - and of prompt + X where X was mixed in."""
    (hidden, _, counted), both = labelled
    model, _ = small_law_model()
    known = []
    for token in range(model.config.vocab_size):
        tokens = jnp.array([PROMPTS[0] + [token]])
        known.append(model.apply({"params": both.draft}, tokens, method=read_hidden)[1][0, -1])
    distance = np.abs(hidden[::2, :1] - np.array(known)[None]).max(axis=-1)
    read = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-4
    assert (read[~counted[::2, 0]] == TEXT[0][0]).all()
    q = laws(both.draft, 0)[0]
    drawn = np.bincount(read[counted[::2, 0]], minlength=5) / counted[::2, 0].sum()
    assert np.abs(drawn - q).max() < 0.06


def test_collect(tiny):
    model, params = tiny
    prompts = [[1, 2, 3], [4] * 9, [5, 6], [7] * 16]
    seen = []
    settings = {"max_new_tokens": 6, "batch_size": 2, "report": seen.append}
    own = collect(model, params, model, params, prompts, **settings)
    assert own.hidden.dtype == np.float16 and own.accept.dtype == np.float32
    assert own.hidden.shape == (len(own.accept), 32) and 12 < len(own.accept) <= 24 and seen == [2, 4]
    np.testing.assert_allclose(own.accept, 1.0, atol=1e-4)
    again = collect(model, params, model, params, prompts, **settings)
    np.testing.assert_array_equal(own.hidden, again.hidden)
    other = collect(model, params, model, params, prompts, **settings, seed=7)
    assert own.hidden.shape != other.hidden.shape or (own.hidden != other.hidden).any()
    with pytest.raises(InputError, match="mix is the chance"):
        collect(model, params, model, params, prompts, mix=1.0)


def least(of, accept: float) -> float:
    """The probability of acceptance at which a loss of (logits, labels) is least, by gradient descent."""
    label_of = jnp.array([accept], jnp.float32)
    optimiser = optax.adam(0.05)

    @jax.jit
    def update(carry, _):
        x, state = carry
        gradient = jax.grad(lambda x: of(jnp.stack([jnp.zeros(()), x])[None], label_of))(x)
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimiser.update(gradient, state)
        return (x + change, state), None

    start = jnp.zeros(())
    (x, _), _ = jax.lax.scan(update, (start, optimiser.init(start)), None, 600)
    return float(jax.nn.sigmoid(x))


def unweighted_rejections(logits, accept, weight=6.0):
    """The loss with a planted bug: the weight is on acceptances."""
    return loss(logits[:, ::-1], 1.0 - accept, weight)


@pytest.mark.parametrize("accept", [0.3, 0.85, 0.97])
def test_the_loss_is_least_below_the_label(accept):
    wanted = accept / (accept + 6.0 * (1 - accept))
    assert least(lambda logits, labels: loss(logits, labels, 6.0), accept) == pytest.approx(wanted, abs=2e-3)
    assert least(lambda logits, labels: loss(logits, labels, 1.0), accept) == pytest.approx(accept, abs=2e-3)
    assert least(unweighted_rejections, accept) != pytest.approx(wanted, abs=5e-2)
    logits = jnp.log(jnp.array([[1 - wanted, wanted]]))
    assert float(binary_kl(unweighted(logits, 6.0), jnp.array([accept]))) == pytest.approx(0.0, abs=1e-5)


def test_the_loss_is_a_mean_by_weight():
    """Twice the same places, the same loss; and as long as a weight is all there is, none matters."""
    logits, labels = jnp.array([[0.3, -0.2], [1.0, 2.0]]), jnp.array([0.2, 0.9])
    once = float(loss(logits, labels, 6.0))
    assert float(loss(jnp.tile(logits, (2, 1)), jnp.tile(labels, 2), 6.0)) == pytest.approx(once, rel=1e-6)
    rejected = jnp.zeros(2)
    assert float(loss(logits, rejected, 6.0)) == pytest.approx(float(loss(logits, rejected, 1.0)), rel=1e-6)


def test_figures_by_hand():
    logits, labels = jnp.log(jnp.array([[0.2, 0.8], [0.2, 0.8], [0.65, 0.35]])), jnp.array([1.0, 0.5, 0.0])
    expected = (np.log(1 / 0.8) + 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8) + np.log(1 / 0.65)) / 3
    assert float(binary_kl(logits, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(calibration_error(logits, labels)) == pytest.approx((abs(1.6 - 1.5) + 0.35) / 3, rel=1e-5)


def learnable(seed: int, num: int) -> Features:
    """Labels that follow from a direction of the hidden state, not linearly, with noise."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num, 16)).astype(np.float16)
    odds = 3.0 * np.abs(hidden[:, 0].astype(np.float32)) - 1.0 + 0.3 * rng.normal(size=num)
    return Features(hidden, (1 / (1 + np.exp(-odds))).astype(np.float32))


CONFIG = TrainConfig(epochs=12, learning_rate=1e-2, batch_size=64)


def quiet(epoch, loss, figures):
    pass


def test_what_can_be_learned_is_learned():
    train_on, held_out, fresh = learnable(0, 2000), learnable(1, 500), learnable(2, 500)
    params, history = train(train_on, held_out, CONFIG, quiet)
    mean = train_on.accept.mean()
    constant = jnp.log(jnp.broadcast_to(jnp.array([1 - mean, mean]), (500, 2)))
    best_constant = float(binary_kl(constant, jnp.asarray(fresh.accept)))
    after = scores(CONFIG, params, fresh)
    assert after.kl < 0.4 * best_constant and after.ece < 0.05
    assert min(figures.kl for figures in history) == scores(CONFIG, params, held_out).kl
    again, history_again = train(train_on, held_out, CONFIG, quiet)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert history == history_again


def test_training_stops_where_nothing_is_learned():
    """Held-out labels that a fresh head has right: it is the best there is, and most epochs never run."""
    train_on = learnable(0, 500)
    held_out = Features(train_on.hidden * np.float16(0.01), np.full(500, 6 / 7, np.float32))
    params, history = train(train_on, held_out, CONFIG, quiet)
    assert len(history) == CONFIG.patience + 1 and history[0].kl < 1e-3
    start = AcceptanceHead().init(jax.random.key(CONFIG.seed), jnp.zeros((1, 16)))["params"]
    jax.tree.map(np.testing.assert_array_equal, params, start)


def test_settings_that_cannot_be():
    for settings in ({"epochs": 0}, {"weight": 0.0}, {"warmup": 1.0}, {"learning_rate": -1.0}):
        with pytest.raises(InputError):
            TrainConfig(**settings)
    empty = Features(np.zeros((0, 16), np.float16), np.zeros(0, np.float32))
    with pytest.raises(InputError, match="no places"):
        train(learnable(0, 10), empty, CONFIG, quiet)


def test_acceptance():
    np.testing.assert_allclose(acceptance(jnp.log(jnp.array([0.2, 0.9])), jnp.log(jnp.array([0.8, 0.3]))), [0.25, 1.0])
