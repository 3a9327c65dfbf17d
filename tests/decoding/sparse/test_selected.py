"""Sparse policies on the way to the kernels, which a CPU never takes."""

import jax
import jax.numpy as jnp
import pytest

from decoding.method import Policy
from decoding.sparse.lserve import LServeOptions, lserve_policy
from decoding.sparse.streaming import streaming_attend
from decoding.sparse.tidal import tidal_attend
from models.attention import TreeRows
from models.cache import init_cache
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from pallas_kernels import dispatch
from tests.support.kernels import lower_for

ATTENTION = AttentionConfig(6, 2, 64)
CONFIG = DecoderConfig("llama", 61, 32, (BlockConfig(ATTENTION, MLPConfig(8)),) * 2, 512)
HALF = {"gates": ((0.9, 0.1), (0.2, 0.8)), "sink": 4, "local": 16}
POLICIES = {
    "tidal": Policy(tidal_attend(("select", "sparse"), 32, False)),
    "lserve": lserve_policy(CONFIG, LServeOptions(budget=64, page=16, logical=8, **HALF)),
    "streaming": Policy(streaming_attend(4, 16)),
}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", POLICIES)
def test_policies_take_kernels_where_they_were_measured_to_be_faster(name, platform, monkeypatch):
    policy = POLICIES[name]
    device = {"cuda": "gpu"}.get(platform, platform)
    cache = init_cache([ATTENTION] * 2, 2, 256, jnp.float32)
    memory = policy.init(cache)

    def step(cache, memory, q, new):
        rows = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32), memory)
        for layer in range(2):
            q, _, rows = policy.attend(q, new, new, cache.layer(layer), rows, config=ATTENTION, layer=layer)
        return q

    shapes = [jax.ShapeDtypeStruct((2, 1, heads, 64), jnp.float32) for heads in (6, 2)]

    def run():  # a function of its own each time: jax keeps what it has traced
        return lower_for(platform, lambda *args: step(*args), cache, memory, *shapes)

    monkeypatch.setattr(dispatch, "platform", lambda: device)
    with pytest.raises(AssertionError):
        run()
    for operation in ("selected_attention", "flash_decode_pages"):
        monkeypatch.setitem(dispatch.PALLAS_FROM, (operation, device), 1)
    run()
