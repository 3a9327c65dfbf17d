"""LoRA: its start and its scale."""

import jax
import jax.numpy as jnp
import numpy as np

from finetune.adapters import LoraConfig, make_adapter

KERNELS = {"q": jnp.zeros((100, 64)), "v": jnp.zeros((25, 16))}


def test_the_first_factor_is_uniform_within_the_inverse_root_of_the_width():
    frozen, trainable = make_adapter(LoraConfig(rank=16)).init(jax.random.key(0), KERNELS, None)
    assert frozen == {"q": {}, "v": {}}
    for path, bound in (("q", 0.1), ("v", 0.2)):
        a = np.asarray(trainable[path]["a"])
        assert a.shape == (KERNELS[path].shape[0], 16)
        assert 0.97 * bound < np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.08)
        np.testing.assert_array_equal(trainable[path]["b"], np.zeros((16, KERNELS[path].shape[1])))


def test_the_scale_is_alpha_over_the_rank():
    for alpha, scale in ((None, 1.0), (16.0, 2.0), (4.0, 0.5)):
        adapter = make_adapter(LoraConfig(rank=8, alpha=alpha))
        frozen, trainable = adapter.init(jax.random.key(0), KERNELS, None)
        factors = adapter.factors(frozen["q"], trainable["q"], (100, 64))
        assert factors.scale == scale and factors.core is None
