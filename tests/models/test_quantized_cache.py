"""Keys and values in few bits: how far they move, and that the cache writes and moves codes as it does numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import LayerCache, append, commit, init_cache
from models.config import AttentionConfig
from models.errors import InputError
from models.quantized_cache import QuantizedSlots, gathered, quantized


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_no_value_moves_by_more_than_half_a_step(bits, shift):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 16)), jnp.float32) * 4 + shift
    codes = quantized(values, bits)
    assert codes.shape == values.shape and codes.rows.dtype == jnp.uint8
    assert codes.rows.shape == (2, 3, 5, 16 * bits // 8 + 4)
    step = np.asarray(values.max(-1) - values.min(-1))[..., None] / (2**bits - 1)
    rounding = np.abs(values).max() * 2.0**-10  # of a scale or zero in float16
    error = np.abs(np.asarray(codes.values()) - values)
    assert (error <= 0.5 * step + rounding).all()
    assert error.max() > 0.2 * step.min(), "that few bits must cost something, or the test says nothing"


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_those_of_the_definition(bits):
    values = np.random.default_rng(1).normal(size=(1, 1, 4, 6)).astype(np.float32)
    codes = quantized(jnp.asarray(values), bits)
    for row, value in enumerate(values[0, 0]):
        zero = np.float16(value.min())
        scale = np.float16((value.max() - value.min()) / (2**bits - 1))
        numbers = np.clip(np.round((value - np.float32(zero)) / np.float32(scale)), 0, 2**bits - 1)
        np.testing.assert_allclose(codes.values()[0, 0, row], numbers * np.float32(scale) + zero, rtol=1e-6, atol=1e-6)
        if bits == 4:
            packed = numbers[:3].astype(np.uint8) + 16 * numbers[3:].astype(np.uint8)
            np.testing.assert_array_equal(codes.rows[0, 0, row, :3], packed)


def test_equal_numbers_stay_as_they_are():
    np.testing.assert_array_equal(quantized(jnp.full((1, 1, 2, 4), 1.5), 4).values(), 1.5)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_cache_writes_and_moves_codes_as_it_does_numbers(bits):
    rng = np.random.default_rng(2)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    plain = init_cache([AttentionConfig(4, 2, 8)], 2, 12, jnp.float32)
    plain = plain.replace(k=(normal(2, 2, 12, 8),), v=(normal(2, 2, 12, 8),), length=jnp.array([3, 6]))
    new_k, new_v = normal(2, 4, 2, 8), normal(2, 4, 2, 8)
    coded = plain.replace(k=(quantized(plain.k[0], bits),), v=(quantized(plain.v[0], bits),))
    assert coded.num_slots == 12

    @jax.jit
    def run(cache):
        layer = append(LayerCache(cache.k[0], cache.v[0], cache.length), new_k, new_v)
        return commit(cache.with_layer(0, layer), jnp.array([[0, 3], [0, 2]]), jnp.array([2, 2]))

    plain, coded = run(plain), run(coded)
    for one, other in ((plain.k[0], coded.k[0]), (plain.v[0], coded.v[0])):
        assert isinstance(other, QuantizedSlots)
        np.testing.assert_allclose(other.values(), quantized(one, bits).values(), atol=1e-6)
        rows = gathered(other, lambda x: x[:, :, 2:5])
        np.testing.assert_array_equal(rows, other.values()[:, :, 2:5])
        np.testing.assert_array_equal(gathered(one, lambda x: x[:, :, 2:5]), one[:, :, 2:5])
    np.testing.assert_array_equal(plain.length, coded.length)


@pytest.mark.parametrize(("bits", "width"), [(3, 8), (16, 8), (4, 7)])
def test_other_bits_are_refused(bits, width):
    with pytest.raises(InputError, match=f"4 or 8 bits .* got {bits}"):
        quantized(jnp.zeros((1, 1, 1, width)), bits)
