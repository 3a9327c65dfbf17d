"""Layers against their formulas in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import MLPConfig, NormConfig, RopeConfig, RopeScaling
from models.layers import MLP, Embedding, Norm, rotary_frequencies, rotary_table, rotate, softcap

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 8)).astype(np.float32)
SCALE, BIAS = RNG.standard_normal((2, 8)).astype(np.float32)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def norm_reference(x, kind, epsilon):
    x = x.astype(np.float64)
    if kind == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * SCALE
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * SCALE + BIAS


def apply_norm(x, kind, epsilon):
    params = {"scale": jnp.asarray(SCALE)} | ({"bias": jnp.asarray(BIAS)} if kind == "layer" else {})
    return Norm(NormConfig(kind, epsilon)).apply({"params": params}, x)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_norms(kind, epsilon):
    np.testing.assert_allclose(
        apply_norm(jnp.asarray(X), kind, epsilon), norm_reference(X, kind, epsilon), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_compute_in_float32(kind):
    """The bfloat16 result is the exact one rounded once; statistics in bfloat16 would be off in a few values."""
    wide = jnp.asarray(RNG.standard_normal((64, 8)) + 4.0, jnp.bfloat16)
    out = apply_norm(wide, kind, 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, apply_norm(wide.astype(jnp.float32), kind, 1e-6).astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_fresh_norm_is_the_plain_normalisation(kind):
    norm = Norm(NormConfig(kind))
    params = norm.init(jax.random.key(0), jnp.asarray(X))["params"]
    assert set(params) == ({"scale"} if kind == "rms" else {"scale", "bias"})
    out = np.asarray(norm.apply({"params": params}, jnp.asarray(X)))
    np.testing.assert_allclose((out**2).mean(-1), 1.0, rtol=1e-4)


def rotated(x, positions, rope, **arguments):
    table = rotary_table(rope, x.shape[-1], jnp.asarray(positions, jnp.int32))
    return np.asarray(rotate(jnp.asarray(x, **arguments), table))


def test_rotation_is_multiplication_by_a_complex_phase():
    x = normal(2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 900, 3, 3, 11]])
    frequencies = 100.0 ** (-np.arange(4) * 2 / 8)
    phases = np.exp(1j * positions[..., None, None] * frequencies)
    turned = (x[..., :4] + 1j * x[..., 4:]) * phases
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(rotated(x, positions, RopeConfig(100.0)), expected, atol=2e-4)
    np.testing.assert_array_equal(rotated(x, np.zeros((2, 5)), RopeConfig(100.0)), x)


def test_bfloat16_is_rotated_in_float32():
    x = jnp.asarray(RNG.standard_normal((1, 6, 2, 8)), jnp.bfloat16)
    positions = 300 + np.arange(6)[None]
    out = rotate(x, rotary_table(RopeConfig(), 8, jnp.asarray(positions, jnp.int32)))
    assert out.dtype == jnp.bfloat16
    wide = rotated(x.astype(jnp.float32), positions, RopeConfig())
    np.testing.assert_array_equal(out, jnp.asarray(wide).astype(jnp.bfloat16))


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), RopeScaling("yarn", 4.0, original_length=64)])
def test_scores_depend_on_the_difference_of_positions(scaling):
    """q at p against k at p' gives the same for every shift of both, and something else for another distance."""
    rope = RopeConfig(100.0, scaling)
    q, k = normal(2, 1, 1, 1, 16)

    def score(at_q, at_k):
        return float((rotated(q, [[at_q]], rope) * rotated(k, [[at_k]], rope)).sum())

    scores = [score(distance + shift, shift) for distance in (0, 1, 5) for shift in (0, 3, 50)]
    scores = np.reshape(scores, (3, 3))
    np.testing.assert_allclose(scores, scores[:, :1] * np.ones((1, 3)), atol=1e-4)
    assert abs(scores[0, 0] - scores[1, 0]) > 1e-3 and abs(scores[1, 0] - scores[2, 0]) > 1e-3


def test_linear_scaling_divides_positions():
    plain, scaled = RopeConfig(100.0), RopeConfig(100.0, RopeScaling("linear", 4.0))
    x = normal(1, 5, 1, 8)
    np.testing.assert_allclose(
        rotated(x, 4 * np.arange(5)[None], scaled), rotated(x, np.arange(5)[None], plain), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_blended_scalings(kind):
    """Fast frequencies stay, slow ones are divided by the factor, those in between lie between, in order."""
    length, head_dim, factor = 512, 64, 8.0
    plain, _ = rotary_frequencies(RopeConfig(10_000.0), head_dim)
    scaling = RopeScaling(kind, factor, original_length=length)
    scaled, attention_factor = rotary_frequencies(RopeConfig(10_000.0, scaling), head_dim)
    slower, rotations = plain / scaled, length * plain / (2 * math.pi)
    slow_limit, fast_limit = (1.0, 4.0) if kind == "llama3" else (1.0, 32.0)
    # YaRN ramps over whole dimensions, so its limits are one dimension wide.
    step = 1.0 if kind == "llama3" else 10_000.0 ** (2 / head_dim)
    fast, slow = rotations > fast_limit * step, rotations < slow_limit / step
    assert fast.sum() >= 3 and slow.sum() >= 3 and (~fast & ~slow).sum() >= 3
    np.testing.assert_allclose(slower[fast], 1.0, rtol=1e-6)
    np.testing.assert_allclose(slower[slow], factor, rtol=1e-6)
    assert (np.diff(slower) >= -1e-5).all() and (np.diff(scaled) < 0).all()
    middle = slower[~fast & ~slow]
    assert ((middle > 1) & (middle < factor)).sum() >= 3
    assert attention_factor == pytest.approx(1.0 if kind == "llama3" else 0.1 * math.log(factor) + 1)


def test_llama3_blend_in_between():
    """A frequency of 2.5 rotations is halfway between the limits 1 and 4: the mean of plain and divided."""
    theta, length = 10_000.0, round(2.5 * 2 * math.pi * 10_000.0**0.5)
    scaling = RopeScaling("llama3", 8.0, original_length=length)
    plain, scaled = (rotary_frequencies(RopeConfig(theta, s), 4)[0] for s in (None, scaling))
    assert scaled[1] / plain[1] == pytest.approx((1 + 1 / 8) / 2, rel=1e-3)


@pytest.mark.parametrize(("given", "expected"), [(None, 0.1 * math.log(4) + 1), (0.7, 0.7)])
def test_yarn_attention_factor_multiplies_both_tables(given, expected):
    scaling = RopeScaling("yarn", 4.0, original_length=64, attention_factor=given)
    cos, sin = rotary_table(RopeConfig(100.0, scaling), 8, jnp.asarray([[0, 9]], jnp.int32))
    np.testing.assert_allclose(np.square(cos) + np.square(sin), expected**2, rtol=1e-5)


def test_rotary_table_shape():
    cos, sin = rotary_table(RopeConfig(), 8, jnp.zeros((2, 3), jnp.int32))
    assert cos.shape == sin.shape == (2, 3, 1, 4) and cos.dtype == sin.dtype == jnp.float32


def test_softcap():
    x = jnp.asarray([-1e4, -3.0, 0.0, 1e-3, 2.0, 1e4], jnp.float32)
    assert softcap(x, None) is x
    np.testing.assert_allclose(softcap(x, 5.0), 5 * np.tanh(np.asarray(x) / 5), rtol=1e-6)
    assert np.abs(softcap(x, 5.0)).max() <= 5


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, gated, bias):
    names = ("gate", "up", "down") if gated else ("up", "down")
    params = {name: normal(*((12, 8) if name == "down" else (8, 12))) for name in names}
    params = {k: {"kernel": v} | ({"bias": normal(v.shape[1])} if bias else {}) for k, v in params.items()}

    def linear(name, x):
        return x @ params[name]["kernel"].astype(np.float64) + (params[name]["bias"] if bias else 0)

    inner, act = linear("up", X), ACTIVATIONS[activation]
    expected = linear("down", act(linear("gate", X)) * inner if gated else act(inner))
    mlp, variables = MLP(MLPConfig(12, activation, gated, bias)), {"params": jax.tree.map(jnp.asarray, params)}
    np.testing.assert_allclose(mlp.apply(variables, jnp.asarray(X)), expected, rtol=1e-4, atol=1e-4)
    out, kept = mlp.apply(variables, jnp.asarray(X), mutable=["intermediates"])
    (sown,) = kept["intermediates"]["inner"]
    assert sown.shape == (2, 3, 12)
    np.testing.assert_allclose(linear("down", np.asarray(sown)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_fresh_mlp_parameters():
    made = jax.eval_shape(MLP(MLPConfig(12, bias=True)).init, jax.random.key(0), jnp.asarray(X))
    assert set(made) == {"params"}
    shapes = jax.tree.map(jnp.shape, made["params"])
    wide, narrow = {"kernel": (8, 12), "bias": (12,)}, {"kernel": (12, 8), "bias": (8,)}
    assert shapes == {"gate": wide, "up": wide, "down": narrow}


def test_embedding():
    layer = Embedding(5, 8)
    table = jnp.asarray(RNG.standard_normal((5, 8)), jnp.float32)
    variables = {"params": {"embedding": table.T}}
    ids = jnp.asarray([[0, 4], [2, 2]], jnp.int32)
    np.testing.assert_array_equal(layer.apply(variables, ids), np.asarray(table)[np.asarray(ids)])
    scores = layer.apply(variables, jnp.asarray(X), method="scores")
    np.testing.assert_allclose(scores, X @ np.asarray(table).T, rtol=1e-5, atol=1e-5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    assert layer.apply(half, ids).dtype == jnp.bfloat16
    assert layer.apply(half, jnp.asarray(X, jnp.bfloat16), method="scores").dtype == jnp.float32
