"""Compiled memory of attention steps: what a policy needs beside the cache, at two sizes of the cache."""

import functools

import jax
import jax.numpy as jnp
import pytest

from decoding.autoregressive import DENSE
from decoding.method import Policy
from decoding.sparse.lserve import LServeOptions, lserve_policy
from decoding.sparse.streaming import streaming_attend
from models.attention import TreeRows
from models.cache import KVCache, init_cache
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig

HEADS, KV_HEADS, WIDTH = 16, 2, 16
ATTENTION = AttentionConfig(HEADS, KV_HEADS, WIDTH)
CONFIG = DecoderConfig("llama", 61, HEADS * WIDTH, (BlockConfig(ATTENTION, MLPConfig(8)),) * 2, 1 << 20)
SLOTS = 4096, 8192
SCORES = HEADS * (SLOTS[1] - SLOTS[0]) * 4  # bytes by which one layer's scores of all tokens grow
SIZES = {"budget": 256, "page": 64, "logical": 16}
HALF = {"gates": ((1.0, 0.0),) * 2, "sink": 16, "local": 64}


def lserve(**options) -> Policy:
    return lserve_policy(CONFIG, LServeOptions(**{**SIZES, **options}))


POLICIES = {
    "lserve": lserve(),
    "lserve, grouped, half streaming": lserve(grouped=True, **HALF),
    "lserve, 8 bits": lserve(kv_bits=8, **HALF),
    "lserve, 4 bits": lserve(kv_bits=4),
    "streaming": Policy(streaming_attend(16, 64)),
}


def temporary_bytes(policy: Policy, slots: int) -> int:
    """Returns what a loop of steps over two layers takes beside its arguments, which are donated."""

    def start(cache: KVCache):
        return policy.keep(cache), policy.init(cache)

    def run(cache, memory, q, new):
        def step(_, carry):
            cache, memory, q = carry
            rows = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32), memory)
            for layer in range(2):
                q, kept, rows = policy.attend(q, new, new, cache.layer(layer), rows, config=ATTENTION, layer=layer)
                cache = cache.with_layer(layer, kept)
            return cache.replace(length=cache.length + 1), rows.memory, q

        return jax.lax.fori_loop(0, 4, step, (cache, memory, q))

    cache = jax.eval_shape(functools.partial(init_cache, [ATTENTION] * 2, 1, slots, jnp.float32))
    vectors = [jax.ShapeDtypeStruct((1, 1, heads, WIDTH), jnp.float32) for heads in (HEADS, KV_HEADS)]
    compiled = jax.jit(run, donate_argnums=(0, 1)).lower(*jax.eval_shape(start, cache), *vectors).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", POLICIES)
def test_memory_beside_the_cache_does_not_grow_with_its_heads_and_slots(name):
    """Scores of logical pages are all that may grow: a 16th of tokens' scores, a few times over."""
    small, large = (temporary_bytes(POLICIES[name], slots) for slots in SLOTS)
    assert large - small < SCORES / 2, (small, large)


def test_dense_attention_grows():
    small, large = (temporary_bytes(DENSE, slots) for slots in SLOTS)
    assert large - small >= SCORES, "or the test above says nothing"
