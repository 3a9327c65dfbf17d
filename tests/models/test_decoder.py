"""The decoder: its parts chain, its cache agrees with a full forward pass, and nothing looks ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import commit, init_cache
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, NormConfig
from models.decoder import Decoder, next_positions
from models.weights.assemble import parameter_shapes

LENGTHS = np.array([7, 3, 1])
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 12))


def i32(values):
    return jnp.asarray(values, jnp.int32)


@pytest.fixture(scope="module")
def full(tiny):
    """Logits of the whole tokens, f32[3, 12, V]."""
    model, params = tiny
    return np.asarray(jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)(i32(TOKENS)))


def test_incremental_decoding_equals_a_full_forward(tiny, full):
    """A right-padded ragged prefill, then one token a step; each row at its own position."""
    model, params = tiny
    run = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, None, cache))
    cache = init_cache([block.attention for block in model.config.blocks], 3, 14, jnp.float32)
    padded = np.where(np.arange(7) < LENGTHS[:, None], TOKENS[:, :7], 60)
    out = run(i32(padded), cache)
    np.testing.assert_array_equal(out.cache.length, 0)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out.logits[row, :length], full[row, :length], atol=1e-4, rtol=1e-4)
    cache = commit(out.cache, None, i32(LENGTHS))
    for step in range(5):
        at = LENGTHS + step
        out = run(i32(TOKENS[np.arange(3), at][:, None]), cache)
        np.testing.assert_allclose(out.logits[:, 0], full[np.arange(3), at], atol=1e-4, rtol=1e-4)
        cache = commit(out.cache, None, jnp.ones((3,), jnp.int32))
    np.testing.assert_array_equal(cache.length, LENGTHS + 5)


def test_the_parts_chain_to_the_whole(tiny, full):
    """embed, layers 0-1, layers 1-L and unembed; the collected streams are what stands between them."""
    model, params = tiny
    bound = model.bind({"params": params})
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], TOKENS.shape)

    @jax.jit
    def run(tokens):
        streams = [bound.embed(tokens, positions)]
        for start, stop in ((0, 1), (1, 3)):
            streams.append(bound.layers(streams[-1], positions, start=start, stop=stop)[0])
        part = bound.layers(streams[1], positions, start=1, stop=2, collect=(0, 1, 2, 3))[1]
        return bound(tokens, collect=(0, 1, 3)), streams, part, bound.unembed(streams[-1]), bound.unembed(streams[1])

    whole, streams, part, logits, early = run(i32(TOKENS))
    assert set(whole.hidden) == {0, 1, 3} and whole.cache is None and whole.aux is None
    for index, stream in zip((0, 1, 3), streams, strict=True):
        np.testing.assert_allclose(whole.hidden[index], stream, atol=1e-4, rtol=1e-4)
    for got in (whole.logits, logits):
        np.testing.assert_allclose(got, full, atol=1e-4, rtol=1e-4)
    assert set(part) == {1, 2}, "only streams inside start..stop"
    np.testing.assert_allclose(part[1], streams[1], atol=1e-4, rtol=1e-4)
    assert early.shape == full.shape and np.abs(early - full).max() > 0.1
    rows = params["embedding"]["embedding"].T[TOKENS]
    np.testing.assert_allclose(streams[0], rows, atol=1e-6)


def test_causality_by_gradients(tiny):
    """Logits at a position depend on the tokens before and at it, and not at all on those after."""
    model, params = tiny
    bound = model.bind({"params": params})
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    at = 6

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.square(bound.unembed(bound.layers(x, positions)[0])[0, at]).sum()

    norms = np.linalg.norm(gradient(bound.embed(i32(TOKENS[:1]), positions))[0], axis=-1)
    assert (norms[:at] > 0).all(), "before"
    assert norms[at] > 0, "at"
    assert (norms[at + 1 :] == 0).all(), "after"


SMALL = DecoderConfig(
    family="llama",
    vocab_size=23,
    width=16,
    blocks=(BlockConfig(AttentionConfig(2, 1, 8), MLPConfig(24)),),
    max_length=16,
)
PLAIN = dataclasses.replace(SMALL.blocks[0], attention=dataclasses.replace(SMALL.blocks[0].attention, rope=None))


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), i32([[0]]))["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.3, jnp.float32), tree)


def logits(config, params, tokens, *args):
    return np.asarray(Decoder(config).apply({"params": params}, i32(tokens), *args).logits)


def test_learned_positions():
    """The learned row of its position is added to each token; the logits know where the text starts."""
    config = dataclasses.replace(SMALL, blocks=(PLAIN,), learned_positions=True)
    params = random_params(config)
    assert params["positions"]["embedding"].shape == (16, 16)
    embed = Decoder(config).apply({"params": params}, i32([[5, 5, 5]]), i32([[0, 3, 9]]), method="embed")
    words, places = (np.asarray(params[name]["embedding"]).T for name in ("embedding", "positions"))
    np.testing.assert_allclose(embed[0], words[5] + places[[0, 3, 9]], rtol=1e-6)
    shifted = logits(config, params, [[5, 6, 7]], i32([[4, 5, 6]]))
    assert np.abs(shifted - logits(config, params, [[5, 6, 7]])).max() > 0.01


def test_positions_follow_the_cache():
    cache = init_cache([SMALL.blocks[0].attention], 2, 8, jnp.float32).replace(length=i32([3, 0]))
    np.testing.assert_array_equal(next_positions(i32([[1, 1], [1, 1]]), cache), [[3, 4], [0, 1]])
    np.testing.assert_array_equal(next_positions(i32([[1, 1], [1, 1]]), None), [[0, 1], [0, 1]])


def test_tied_and_untied_embeddings():
    """The untied model with the transposed embedding as its unembedding is the tied model."""
    tied = dataclasses.replace(SMALL, tied_embeddings=True)
    params = random_params(tied)
    assert set(parameter_shapes(Decoder(SMALL))) - set(parameter_shapes(Decoder(tied))) == {"unembedding/kernel"}
    expected = logits(tied, params, [[1, 2, 3]])
    twin = params | {"unembedding": {"kernel": params["embedding"]["embedding"]}}
    np.testing.assert_allclose(logits(SMALL, twin, [[1, 2, 3]]), expected, atol=1e-5)
    twin["unembedding"] = {"kernel": twin["unembedding"]["kernel"] * 2}
    np.testing.assert_allclose(logits(SMALL, twin, [[1, 2, 3]]), 2 * expected, atol=1e-5)


def test_logit_softcap_and_embedding_scale():
    params = random_params(SMALL)
    plain = logits(SMALL, params, [[1, 2, 3]])
    capped = logits(dataclasses.replace(SMALL, logit_softcap=0.5), params, [[1, 2, 3]])
    assert np.abs(plain).max() > 0.5 > np.abs(capped).max()
    np.testing.assert_allclose(capped, 0.5 * np.tanh(plain / 0.5), atol=1e-5)
    scaled = dataclasses.replace(SMALL, embedding_scale=3.0)
    tripled = params | {"embedding": {"embedding": 3 * params["embedding"]["embedding"]}}
    np.testing.assert_allclose(logits(scaled, params, [[1, 2, 3]]), logits(SMALL, tripled, [[1, 2, 3]]), atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_post_norms_stand_on_each_branch(norm):
    """With their scales at zero (and no bias) the branches vanish: what is left is the embedding."""
    block = dataclasses.replace(SMALL.blocks[0], norm=NormConfig(norm), post_norms=True)
    config = dataclasses.replace(SMALL, blocks=(block,))
    params = random_params(config)
    for name in ("post_attention_norm", "post_mlp_norm"):
        params["layers_0"][name] = jax.tree.map(jnp.zeros_like, params["layers_0"][name])
    out = Decoder(config).apply({"params": params}, i32([[1, 2, 3]]), collect=(0, 1))
    np.testing.assert_array_equal(out.hidden[1], out.hidden[0])
    assert np.abs(logits(config, random_params(config), [[1, 2, 3]]) - out.logits).max() > 0.01


def test_bfloat16_parameters(tiny, full):
    """Runs in bfloat16, gives float32 logits, and stays within what 8 bits of mantissa explain."""
    model, params = tiny
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = jax.jit(lambda p, tokens: model.apply({"params": p}, tokens, collect=(3,)))(half, i32(TOKENS))
    assert out.logits.dtype == jnp.float32 and out.hidden[3].dtype == jnp.bfloat16
    error = np.asarray(out.logits) - full
    assert np.sqrt((error**2).mean()) < 0.05 * full.std()


def test_equal_models_share_one_compilation():
    """A model is a value: two of the same config hash alike, so jit with a static model compiles once."""
    again = dataclasses.replace(SMALL, blocks=tuple(SMALL.blocks))
    other = dataclasses.replace(SMALL, logit_softcap=2.0)
    assert Decoder(SMALL) == Decoder(again) and hash(Decoder(SMALL)) == hash(Decoder(again))
    assert Decoder(SMALL) != Decoder(other)
    traces = []

    def run(model, params, tokens):
        traces.append(model)
        return model.apply({"params": params}, tokens, method=lambda m, t: m.embedding(t))

    run = jax.jit(run, static_argnums=0)
    for config in (SMALL, again, other, SMALL):
        run(Decoder(config), random_params(config), i32([[1, 2]]))
    assert len(traces) == 2


def test_remat_keeps_less_and_changes_nothing(tiny):
    """The same parameters, loss and gradient; each block of the forward pass is computed again in the backward one."""
    model, params = tiny
    again = Decoder(model.config, remat=True)
    assert parameter_shapes(again) == parameter_shapes(model)

    def gradient(model):
        def loss(params):
            logits = model.apply({"params": params}, i32(TOKENS)).logits
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

        return jax.value_and_grad(loss)

    (loss, grads), (other_loss, other_grads) = (jax.jit(gradient(m))(params) for m in (model, again))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for (path, want), got in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=1e-4, err_msg=str(path))
    # MLPs compute their gate again in any case; with remat each of the three blocks adds one of its own.
    plain, whole = (str(jax.make_jaxpr(gradient(m))(params)).count("prevent_cse") for m in (model, again))
    assert whole >= plain + 3
