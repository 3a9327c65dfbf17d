"""CoreInfer against a slow reference, against masks, and against dense decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import decoding.prefill
from decoding import make_decode_fn
from decoding.method import with_kernels
from decoding.prefill import Prompts
from decoding.sparse import core_infer
from decoding.sparse.core_infer import (
    CoreInferOptions,
    Votes,
    chosen_neurons,
    sliced,
    sparse_layers,
    strongest,
    token_votes,
)
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig
from models.decoder import Decoder
from models.errors import InputError
from models.kernels import LowRank
from tests.support.decode_reference import forward, texts
from tests.support.sparse_reference import Rule, SlowRow, deep_model, kept_neurons

LENGTHS = (1, 30, 13, 47)
PROMPTS = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in LENGTHS]
LAYERS = {"first": 1, "last": 3}  # of layers 0 to 4
NEW = 10


@pytest.fixture(scope="module")
def deep():
    return deep_model()


@functools.cache
def random_activations(relu: bool) -> np.ndarray:
    """Returns f32[2, 9, 40]; of those of a ReLU more than half are zero."""
    values = np.random.default_rng(0).normal(size=(2, 9, 40)).astype(np.float32)
    return np.maximum(values - 0.3, 0.0) if relu else values


def slow_limit(rows: np.ndarray, alpha: float) -> int:
    return int(np.floor(np.float32(alpha) * np.float32((rows > 0).sum() / len(rows))))


def slow_votes(rows: np.ndarray, limit: int) -> np.ndarray:
    """Returns i[F]: the votes of activations f[M, F], by sorting each token's in plain Python."""
    count = np.zeros(rows.shape[1], int)
    for row in rows:
        for neuron in sorted(range(len(row)), key=lambda n: (-row[n], n))[:limit]:
            count[neuron] += 1
    return count


def slow_set(count: np.ndarray, total: np.ndarray, beta: float) -> list[int]:
    ranked = sorted(range(len(count)), key=lambda n: (-count[n], -total[n], n))
    return sorted(ranked[: int(beta * len(count))])


@pytest.fixture(scope="module")
def inner(deep) -> list[list[np.ndarray]]:
    """Returns f[M, F] for each prompt and layer, from what leaves the gate and the up projection."""
    model, params = deep
    tokens = jnp.asarray([prompt + [0] * (47 - len(prompt)) for prompt in PROMPTS], jnp.int32)
    keep = {"capture_intermediates": lambda module, _: module.name in ("up", "gate"), "mutable": ["intermediates"]}
    kept = jax.jit(functools.partial(model.apply, **keep))({"params": params}, tokens)[1]["intermediates"]
    found = []
    for index in range(model.config.num_layers):
        gate, up = (np.asarray(kept[f"layers_{index}"]["mlp"][name]["__call__"][0]) for name in ("gate", "up"))
        found.append(gate / (1 + np.exp(-gate)) * up)
    return [[layer[row, :length] for layer in found] for row, length in enumerate(LENGTHS)]


def neurons(params, state) -> dict[str, list[int]]:
    """Returns the chosen neurons of each layer of a state, after checking that its three kernels agree."""
    found = kept_neurons(params, state.kernels)
    for name, layer in state.kernels.items():
        assert len(found[name]) == len(layer["mlp"]["down"]["kernel"].w)
        for part in ("up", "gate"):
            whole = np.asarray(params[name]["mlp"][part]["kernel"])
            np.testing.assert_array_equal(layer["mlp"][part]["kernel"].w, whole[:, found[name]])
    return {name: chosen.tolist() for name, chosen in found.items()}


def start(deep, prompts, **options):
    """Returns the state before the first step."""
    fn = make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, **{**LAYERS, **options})
    return fn.start(deep[1], *fn.inputs(prompts))


@pytest.mark.parametrize("options", [{}, {"alpha": 0.9, "beta": 0.7}, {"choose": "absolute"}])
def test_the_set_is_that_of_the_slow_reference(deep, inner, options):
    for prompt in (0, 2):
        found = neurons(deep[1], start(deep, [PROMPTS[prompt]], **options))
        assert list(found) == ["layers_1", "layers_2", "layers_3"]
        for index, rows in enumerate(inner[prompt]):
            rows = np.abs(rows) if options.get("choose") == "absolute" else rows
            count = slow_votes(rows, slow_limit(rows, options.get("alpha", 0.4)))
            slow = slow_set(count, rows.sum(axis=0), options.get("beta", 0.4))
            assert found.get(f"layers_{index}", slow) == slow


def test_a_batch_shares_the_set_of_its_summed_votes(deep, inner):
    found = neurons(deep[1], start(deep, PROMPTS))
    for layer in range(1, 4):
        count = sum(slow_votes(rows[layer], slow_limit(rows[layer], 0.4)) for rows in inner)
        assert found[f"layers_{layer}"] == slow_set(count, sum(rows[layer].sum(axis=0) for rows in inner), 0.4)
    alone = neurons(deep[1], start(deep, PROMPTS[3:]))
    assert found != alone, "the others must count, or the test says nothing"
    assert neurons(deep[1], start(deep, PROMPTS[3:] * 4)) == alone, "equal prompts, equal sets"


def test_prompts_in_chunks_have_a_limit_per_chunk(deep, inner, monkeypatch):
    whole = neurons(deep[1], start(deep, PROMPTS[3:]))
    monkeypatch.setattr(decoding.prefill, "CHUNK", 16)
    jax.clear_caches()
    found = neurons(deep[1], start(deep, PROMPTS[3:]))
    jax.clear_caches()
    assert found != whole, "the limits must differ, or the test says nothing"
    for layer, rows in enumerate(inner[3]):
        chunks = [rows[begin : begin + 16] for begin in range(0, 47, 16)]
        count = sum(slow_votes(chunk, slow_limit(chunk, 0.4)) for chunk in chunks)
        slow = slow_set(count, rows.sum(axis=0), 0.4)
        assert found.get(f"layers_{layer}", slow) == slow


def test_padding_does_not_vote(deep):
    fn = make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, **LAYERS)
    prompts, call = fn.inputs(PROMPTS[2:3])
    right = neurons(deep[1], fn.start(deep[1], prompts, call))
    noise = np.random.default_rng(7).integers(0, 61, (1, 64)).astype(np.int32)
    noise[0, :13] = PROMPTS[2]
    assert neurons(deep[1], fn.start(deep[1], Prompts(noise, prompts.lengths), call)) == right
    assert neurons(deep[1], fn.start(deep[1], Prompts(noise, np.array([20], np.int32)), call)) != right


@pytest.mark.parametrize("relu", [False, True])
def test_strongest_breaks_ties_by_index(relu):
    values, limit = random_activations(relu), [6, 30]
    found = np.asarray(strongest(jnp.asarray(values), jnp.array(limit)))
    for row, most in enumerate(limit):
        np.testing.assert_array_equal(found[row].sum(axis=0), slow_votes(values[row], most))
        assert (found[row].sum(axis=1) == most).all()
    none_and_all = np.asarray(strongest(jnp.asarray(values), jnp.array([0, 40])))
    assert not none_and_all[0].any() and none_and_all[1].all()
    some = [-np.inf, -3e38, -1e-40, 0.0, 1e-40, 0.5, 3e38, np.inf]
    for limit in range(9):
        found = np.asarray(strongest(jnp.asarray([[some]], jnp.float32), jnp.array([limit])))[0, 0]
        assert found.tolist() == [place >= 8 - limit for place in range(8)]


@pytest.mark.parametrize("relu", [False, True])
def test_votes_do_not_depend_on_the_order_of_tokens_or_on_padding(relu):
    values, options = random_activations(relu)[:1], CoreInferOptions(alpha=0.7)
    real = jnp.ones((1, 9), bool)
    votes = token_votes(jnp.asarray(values), real, options)
    np.testing.assert_array_equal(votes.count, slow_votes(values[0], slow_limit(values[0], 0.7)))
    order = np.random.default_rng(1).permutation(9)
    padded = np.concatenate([values[:, order], 9 + random_activations(False)[:1, :4]], axis=1)
    again = token_votes(jnp.asarray(padded), jnp.arange(13)[None, :] < 9, options)
    left = token_votes(jnp.asarray(padded[:, ::-1].copy()), jnp.arange(13)[None, :] >= 4, options)
    for other in (again, left):
        np.testing.assert_array_equal(other.count, votes.count)
        np.testing.assert_allclose(other.total, votes.total, rtol=1e-5)
    assert (token_votes(jnp.asarray(padded), jnp.ones((1, 13), bool), options).count != votes.count).any()


@pytest.mark.parametrize("choose", ["core", "absolute", "magnitude", "random"])
def test_sets_have_their_exact_size_and_are_nested_in_beta(choose):
    votes = token_votes(jnp.asarray(random_activations(False)), jnp.ones((2, 9), bool), CoreInferOptions(choose=choose))
    before: set[int] = set()
    for beta in (0.05, 0.2, 0.4, 0.61, 0.8, 1.0):
        kept = chosen_neurons([votes], CoreInferOptions(beta=beta, choose=choose))[0].tolist()
        assert len(kept) == len(set(kept)) == int(beta * 40) and kept == sorted(kept)
        assert before < set(kept)
        before = set(kept)


def test_ranks_are_votes_then_sums_then_indices():
    votes = Votes(jnp.array([1, 3, 1, 1, 0, 1]), jnp.array([0.5, -9.0, 2.0, 0.5, 8.0, 0.5]))
    sets = [chosen_neurons([votes], CoreInferOptions(beta=n / 6 + 0.01))[0].tolist() for n in range(1, 6)]
    assert sets == [[1], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 5]]
    magnitude = CoreInferOptions(beta=0.34, choose="magnitude")
    assert chosen_neurons([votes], magnitude)[0].tolist() == [2, 4]


def test_random_sets_differ_between_layers_and_not_between_prompts(deep):
    found = neurons(deep[1], start(deep, PROMPTS[:1], choose="random"))
    assert found == neurons(deep[1], start(deep, PROMPTS[2:3], choose="random"))
    assert found["layers_1"] != found["layers_2"] != found["layers_3"]


def test_all_neurons_are_dense_decoding(deep, tiny):
    model, params = deep
    tokens = jnp.asarray([PROMPTS[3]], jnp.int32)
    whole = with_kernels(params, start(deep, PROMPTS, beta=1.0).kernels)
    np.testing.assert_allclose(forward(model, whole, tokens), forward(model, params, tokens), rtol=1e-5, atol=1e-5)
    fn = make_decode_fn(tiny[0], "core_infer", max_new_tokens=24, beta=1.0)
    assert texts(fn(tiny[1], PROMPTS)) == texts(make_decode_fn(tiny[0], max_new_tokens=24)(tiny[1], PROMPTS))


def masked(params, kernels):
    """Returns whole matrices with zeros in the rows of each down projection that were not chosen."""
    for name, chosen in kept_neurons(params, kernels).items():
        kernel = params[name]["mlp"]["down"]["kernel"]
        zeroed = jnp.zeros_like(kernel).at[chosen].set(kernel[chosen])
        params = with_kernels(params, {name: {"mlp": {"down": {"kernel": zeroed}}}})
    return params


def test_slices_equal_masks(deep):
    model, params = deep
    kernels = start(deep, PROMPTS).kernels
    tokens = jnp.asarray([PROMPTS[3]], jnp.int32)
    trees = params, with_kernels(params, kernels), masked(params, kernels)
    dense, small, zeroed = (np.asarray(forward(model, tree, tokens)) for tree in trees)
    np.testing.assert_allclose(small, zeroed, rtol=1e-4, atol=1e-4)
    assert np.abs(small - dense).max() > 0.5, "the set must cost something, or the test says nothing"


def test_layers_outside_and_attention_stay_as_they_are(deep):
    before = flatten_dict(deep[1], sep="/")
    after = flatten_dict(with_kernels(deep[1], start(deep, PROMPTS).kernels), sep="/")
    assert set(after) == set(before)
    changed = {path for path in before if after[path] is not before[path]}
    assert changed == {f"layers_{i}/mlp/{part}/kernel" for i in (1, 2, 3) for part in ("up", "gate", "down")}


def test_neurons_of_zeros_behind_the_chosen_change_nothing(deep, monkeypatch):
    model, params = deep
    tokens, chosen = jnp.asarray([PROMPTS[3]], jnp.int32), [jnp.arange(1, 20)]
    found = {}
    for whole in (32, 2):  # 19 neurons are too few for a multiple of 32, and become 20
        monkeypatch.setattr(core_infer, "WHOLE", whole)
        kernels = sliced(params, [2], chosen)
        found[whole] = (
            kernels["layers_2"]["mlp"]["up"]["kernel"].shape,
            forward(model, with_kernels(params, kernels), tokens),
        )
    assert [found[whole][0] for whole in (32, 2)] == [(32, 19), (32, 20)]
    np.testing.assert_allclose(found[2][1], found[32][1], rtol=1e-5, atol=1e-5)


def test_its_text_is_what_the_slow_reference_would_write(deep):
    """The prompt is read with the whole weights, everything after it with one set."""
    model, params = deep
    fn = make_decode_fn(model, "core_infer", max_new_tokens=NEW, **LAYERS)
    for prompt in (PROMPTS[0], PROMPTS[2]):
        state = fn.start(params, *fn.inputs([prompt]))
        text = texts(fn(params, [prompt]))[0]
        slow = SlowRow(model, params)
        if prompt[:-1]:
            slow.read(prompt[:-1], Rule())
        slow.params = masked(params, state.kernels)
        for token, read in zip(text, [prompt[-1], *text], strict=False):
            logits = slow.read([read], Rule())
            assert logits[token] > logits.max() - 1e-3
    assert text != texts(make_decode_fn(model, max_new_tokens=NEW)(params, [prompt]))[0]


def test_a_set_stays_for_the_whole_request(deep):
    fn = make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, **LAYERS)
    state = fn.start(deep[1], *fn.inputs(PROMPTS))
    first = neurons(deep[1], state)
    while not state.done.all():
        state = fn.advance(deep[1], state, 3)
        assert neurons(deep[1], state) == first
    assert texts(fn.output(state)) == texts(fn(deep[1], PROMPTS))


def test_drafts_are_verified_by_the_sparse_model(deep):
    plain = make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, **LAYERS)(deep[1], PROMPTS)
    drafted = make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, drafted=4, **LAYERS)(deep[1], PROMPTS)
    assert texts(drafted) == texts(plain)


def test_other_kernels_are_sliced_as_their_matrices(deep):
    model, params = deep
    rng, mlp = np.random.default_rng(0), params["layers_2"]["mlp"]
    low = {}
    for name in ("up", "down"):
        base = mlp[name]["kernel"]
        a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((base.shape[0], 2), (2, base.shape[1])))
        low[name] = {"kernel": LowRank(base, a, None, b, 0.1)}
    dense = {name: {"kernel": part["kernel"].materialize()} for name, part in low.items()}
    outputs = [
        make_decode_fn(model, "core_infer", max_new_tokens=NEW, **LAYERS)(tree, PROMPTS)
        for tree in (with_kernels(params, {"layers_2": {"mlp": parts}}) for parts in (low, dense))
    ]
    assert texts(outputs[0]) == texts(outputs[1])


def test_an_mlp_with_biases_and_without_a_gate():
    block = BlockConfig(AttentionConfig(2, 2, 8), MLPConfig(40, activation="relu", gated=False, bias=True))
    model = Decoder(DecoderConfig("gpt2", vocab_size=61, width=16, blocks=(block,) * 2, max_length=128))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(
        lambda x: 9 * x if x.ndim == 2 else jax.random.normal(jax.random.key(len(x)), x.shape), params
    )
    fn = make_decode_fn(model, "core_infer", max_new_tokens=NEW)
    kernels = fn.start(params, *fn.inputs(PROMPTS[2:3])).kernels
    tokens = jnp.asarray([PROMPTS[3]], jnp.int32)
    small, zeroed = (forward(model, tree(params, kernels), tokens) for tree in (with_kernels, masked))
    np.testing.assert_allclose(small, zeroed, rtol=1e-4, atol=1e-4)
    assert kernels["layers_0"]["mlp"]["up"]["bias"].shape == (16,)


def test_the_middle_layers_are_sparse(deep):
    block = deep[0].config.blocks[0]
    for num_layers, first, last in ((32, 6, 26), (30, 6, 24), (28, 5, 22), (1, 0, 0)):
        config = dataclasses.replace(deep[0].config, blocks=(block,) * num_layers)
        assert sparse_layers(config, CoreInferOptions()) == range(first, last + 1)


def test_slices_come_once_per_request_and_not_in_the_loop(deep):
    """What a step multiplies with has the size of the set, and is not gathered there."""
    fn = make_decode_fn(deep[0], "core_infer", max_new_tokens=NEW, **LAYERS)
    state = fn.start(deep[1], *fn.inputs(PROMPTS[:1]))
    step = fn.plan.steps().step
    lines = str(jax.make_jaxpr(step)(with_kernels(deep[1], state.kernels), state))
    assert "f32[32,19]" in lines and "f32[19,32]" in lines
    assert lines.count("f32[32,48]") == 2 * 2, "gate and up of the two layers that stay dense"
    layer = sliced(deep[1], [2], [jnp.array([0, 5])])["layers_2"]["mlp"]
    np.testing.assert_array_equal(layer["gate"]["kernel"].w, deep[1]["layers_2"]["mlp"]["gate"]["kernel"][:, [0, 5]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be a share, above 0 and at most 1; got 0"),
        ({"beta": 1.2}, "beta must be a share, above 0 and at most 1; got 1.2"),
        ({"beta": 0.02}, "beta 0.02 keeps none of 48 neurons: raise it to 0.020834"),
        ({"choose": "kore"}, "choose 'kore'"),
        ({"last": 5}, "layers of the model, 0 to 4, in this order; got 1 and 5"),
        ({"first": 4, "last": 3}, "got 4 and 3"),
        ({"drafted": -1}, "drafted must be 0"),
    ],
)
def test_wrong_options_are_refused(deep, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(deep[0], "core_infer", **options)
