"""What a method's label promises, checked for every row of the registry.

A method joins these tests by its row in `METHODS` alone: `exact` methods must give greedy text, `distribution` methods
and exact ones that sample the law of plain sampling, and a row must not depend on who shares its batch, but where a
method says that it does (`shared`).
Methods that draft with a second model get one that is often, not always, right.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoding.decode
from decoding import METHODS, make_decode_fn
from decoding.autoregressive import SAMPLE, make_sample
from decoding.method import Method, Steps, WithDraft
from decoding.speculative.head_kinds import HEADS
from decoding.speculative.hidden_transfer import HiddenTransferConfig
from decoding.speculative.specdec_pp import WithHead
from models.acceptance_head import AcceptanceHead
from models.config import MLPConfig, MoEConfig
from models.decoder import Decoder
from models.sharding import MeshConfig, make_mesh, place
from tests.conftest import tiny_config
from tests.support.decode_reference import (
    PROMPTS,
    ROOM,
    chi_squared_p,
    exact_pairs_behind,
    greedy_texts,
    noisy,
    row_seeds,
    small_law_model,
    texts,
)

DRAWS = 40_000
PROMPT = [2, 0, 3]
SMALL = {  # options of methods that take long to compile, or that would read all of a short text
    "aded": {"slots": 256, "iterations": 20, "sentences": 6},
    "chimera": {"nodes": 5, "offsets": 3},
    "clover": {"nodes": 3},
    "core_infer": {"first": 1, "last": 1},
    "dyspec": {"budget": 5, "frontier": 3, "depth": 3},
    "eagle": {"nodes": 9, "offsets": 3},
    "hidden_transfer": {"nodes": 9, "head": HiddenTransferConfig(layers=(0, 1, 1))},
    "knob": {"layer": 1, "direction": tuple(range(-7, 25)), "strength": 3.0},
    "lserve": {
        "budget": 6,
        "page": 2,
        "logical": 1,
        "reuse": 2,
        "sink": 1,
        "local": 3,
        "gates": ((0.1, 0.9), (0.0, 0.0), (0.8, 0.2)),
    },
    "medusa": {"nodes": 9},
    "ppd": {"nodes": 11},
    "rapid": {"length": 3},
    "rsd_c": {"children": (3, 2)},
    "rsd_s": {"beams": 3, "depth": 2},
    "specdec_pp": {"longest": 3},
    "speculative_sampling": {"length": 3},
    "streaming": {"sink": 2, "local": 4},
    "tidal": {"budget": 4, "select": (0,), "correct_every": 5},
    "token_recycling": {"width": 20},
}
SHARED = ("embedding", "final_norm", "unembedding")
LABELS = ("exact", "distribution", "lossy")
LAWS = {
    "plain": {},
    "filtered": {"temperature": 1.4, "top_k": 4, "top_p": 0.93, "min_p": 0.02, "repetition_penalty": 1.3},
}


def labelled(label: str) -> list[str]:
    return [name for name, method in METHODS.items() if method.label == label]


def apart() -> list[str]:
    return [name for name, method in METHODS.items() if not method.shared]


def lawful() -> list[str]:
    return [name for name, method in METHODS.items() if method.label != "lossy" and method.temperature is not None]


def made(name: str, model, params, room: int, **more):
    """Returns (decode_fn, params) of a method; a draft is the model's first layer, its weights somewhat off."""
    options = {**SMALL.get(name, {}), **more}
    if METHODS[name].own_head:
        fn = make_decode_fn(model, name, max_new_tokens=room, **options)
        return fn, WithDraft(params, random_head(HEADS[name], fn.plan.options.head, model, params))
    if not METHODS[name].drafts:
        return make_decode_fn(model, name, max_new_tokens=room, **options), params
    draft = Decoder(dataclasses.replace(model.config, blocks=model.config.blocks[:1]))
    first = {name: part for name, part in params.items() if name in ("layers_0", *SHARED)}
    fn = make_decode_fn(model, name, max_new_tokens=room, draft=draft, **options)
    drafts = noisy(first, 0.1)
    if METHODS[name].head:  # whose word is as good as any, and changes from token to token
        head = AcceptanceHead().init(jax.random.key(3), jnp.zeros((1, model.config.width)))["params"]
        drafts = WithHead(drafts, jax.tree.map(lambda x: 9.0 * x, head))
    return fn, WithDraft(params, drafts)


def random_head(kind, config, model, params):
    """A head of random weights: it guesses by chance, and sometimes what the target writes."""
    fresh = kind.init(config, model, params, jax.random.key(5))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@pytest.mark.parametrize("name", METHODS)
def test_registry_rows_are_complete(name):
    method = METHODS[name]
    assert isinstance(method, Method) and method.label in LABELS
    assert dataclasses.is_dataclass(method.options) and hash(method.options()) == hash(method.options())
    assert method.temperature is not None or method.label != "distribution"
    assert not method.shared or method.label == "lossy"


@pytest.fixture(scope="module")
def greedy(tiny) -> list[list[int]]:
    return greedy_texts(*tiny, PROMPTS, ROOM)


@pytest.mark.parametrize("name", labelled("exact"))
def test_exact_methods_give_greedy_text(tiny, greedy, name):
    fn, params = made(name, *tiny, ROOM)
    assert texts(fn(params, PROMPTS)) == greedy
    for row in (0, 2, 5):
        assert texts(fn(params, [PROMPTS[row]])) == [greedy[row]]


@pytest.fixture(scope="module")
def mixture() -> tuple[Decoder, dict]:
    """(model, params): two layers, the second a mixture of four experts, two of them for a token."""
    experts = MoEConfig(4, 2, MLPConfig(24), shared=MLPConfig(16))
    config = tiny_config()
    blocks = (config.blocks[0], dataclasses.replace(config.blocks[1], mlp=experts))
    model = Decoder(dataclasses.replace(config, blocks=blocks))
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: x * 12.0 if x.ndim > 1 else x, params)


@pytest.mark.parametrize("name", ["greedy", "sample", "token_recycling", "speculative_sampling", "eagle"])
def test_mixtures_of_experts_are_decoded_like_any_model(mixture, name):
    """Greedy text at temperature zero; where a method samples, a row's text is its own and plain sampling's in law."""
    fn, params = made(name, *mixture, ROOM)
    cold = {} if METHODS[name].temperature is None else {"temperature": 0.0}
    found = texts(fn(params, PROMPTS, **cold))
    assert found == greedy_texts(*mixture, PROMPTS, ROOM)
    assert len({token for text in found for token in text}) > 10
    if cold:
        together = texts(fn(params, PROMPTS, row_seeds(), temperature=1.0))
        assert together != found
        assert texts(fn(params, PROMPTS[2:3], row_seeds()[2:3], temperature=1.0)) == together[2:3]


def test_experts_spread_over_devices_write_the_same_text(mixture):
    fn, params = made("greedy", *mixture, ROOM)
    spread = place(params, make_mesh(MeshConfig(1, 1, 1, 2)))
    assert texts(fn(spread, PROMPTS)) == greedy_texts(*mixture, PROMPTS, ROOM)


@pytest.mark.parametrize("name", apart())
def test_rows_do_not_depend_on_their_batch(tiny, name):
    fn, params = made(name, *tiny, ROOM)
    settings = {} if METHODS[name].temperature is None else {"temperature": 0.8, "top_p": 0.9}
    output = fn(params, PROMPTS, row_seeds(), **settings)
    together = texts(output)
    for row in range(0, len(PROMPTS), 2):
        alone = fn(params, [PROMPTS[row]], row_seeds()[row : row + 1], **settings)
        assert texts(alone) == [together[row]], f"row {row}"
        if output.warm is not None:
            continue  # what all rows teach the drafter saves each of them steps
        same_row = jax.tree.map(lambda many, row=row: many[row : row + 1], output.stats)
        jax.tree.map(np.testing.assert_array_equal, alone.stats, same_row)


@pytest.mark.parametrize("name", labelled("exact"))
def test_a_stop_token_and_a_limit_cut_the_greedy_text(tiny, greedy, name):
    """Stop tokens that stand in the middle of what a step accepts, limits that end there; then no new compilation."""
    stops = {text[place] for text, place in zip(greedy[::2], (4, 9, 14, 2), strict=True)}
    limit = [ROOM, 5, ROOM, 1, 7, ROOM, 11, 0]
    expected = []
    for text, most in zip(greedy, limit, strict=True):
        ends = [place + 1 for place, token in enumerate(text) if token in stops]
        expected.append(text[: min([most, *ends])])
    assert len({len(text) for text in expected}) > 4
    fn, params = made(name, *tiny, ROOM, stop_tokens=sorted(stops))
    assert texts(fn(params, PROMPTS, max_new_tokens=limit)) == expected
    compiled = decoding.decode._decode._cache_size()
    fn(params, [prompt[:-1] or [1] for prompt in PROMPTS], 5, max_new_tokens=limit[::-1])
    assert decoding.decode._decode._cache_size() == compiled, "one trace per bucket and method"


@pytest.mark.parametrize("name", METHODS)
def test_counts_fit_together(tiny, name):
    fn, params = made(name, *tiny, ROOM)
    limit = [0, 1, 24, 3, 7, 23, 2, 11]
    output = fn(params, PROMPTS, row_seeds(), max_new_tokens=limit)
    stats = jax.tree.map(np.asarray, output.stats)
    assert [len(text) for text in texts(output)] == limit
    np.testing.assert_array_equal(stats.emitted, limit)
    assert (stats.steps <= stats.emitted).all() and (stats.steps[1:] > 0).all()
    np.testing.assert_array_equal(stats.histogram.sum(axis=1), stats.steps)
    np.testing.assert_array_equal(stats.histogram @ np.arange(stats.histogram.shape[1]), limit)
    assert (stats.histogram[:, 0] == 0).all()
    assert (stats.accepted <= stats.drafted).all() and (stats.emitted <= stats.accepted + stats.target_calls).all()


def pairs(name: str, settings: dict, seed: int = 0) -> np.ndarray:
    """Returns i[N]: first token * V + second token of many rows with keys of their own."""
    model, params = small_law_model()
    fn, params = made(name, model, params, 2)
    output = fn(params, [PROMPT] * DRAWS, seed, **{"temperature": 1.0, **settings})
    assert (np.asarray(output.lengths) == 2).all()
    tokens = np.asarray(output.tokens)
    return tokens[:, 0] * model.config.vocab_size + tokens[:, 1]


def test_the_law_is_worth_testing():
    plain, some = (exact_pairs_behind(PROMPT, settings) for settings in LAWS.values())
    assert (plain > 0).all() and (plain > 0.01).sum() > 8 and plain.max() < 0.5
    assert 4 < (some > 0).sum() < 16, "top-k alone keeps 16 pairs: top-p and min-p must cut too"
    second = plain.reshape(5, 5) / plain.reshape(5, 5).sum(axis=1, keepdims=True)
    assert np.abs(second - second[0]).max() > 0.2, "the second token must depend on the first"


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", lawful())
def test_methods_that_sample_follow_the_law(name, law):
    assert chi_squared_p(pairs(name, LAWS[law]), exact_pairs_behind(PROMPT, LAWS[law])) > 1e-3


@pytest.mark.parametrize("name", lawful())
def test_the_test_of_the_law_sees_a_wrong_temperature(name):
    assert chi_squared_p(pairs(name, {"temperature": 1.1}), exact_pairs_behind(PROMPT, {})) < 1e-6


def make_broken(model, options, stop_tokens) -> Steps:
    """Sampling with a planted bug: every step of a row draws with the same noise."""
    steps = make_sample(model, options, stop_tokens)

    def step(params, state):
        after = steps.step(params, state.replace(lengths=jnp.zeros_like(state.lengths)))
        moved = jnp.where(jnp.arange(2)[None, :] == state.lengths[:, None], after.last[:, None], state.tokens)
        lengths = state.lengths + 1
        return after.replace(tokens=moved, lengths=lengths, done=lengths >= state.limit)

    return Steps(steps.init, step)


def test_the_test_of_the_law_sees_noise_that_is_used_twice(monkeypatch):
    monkeypatch.setitem(METHODS, "broken", SAMPLE._replace(make=make_broken))
    tokens, law = pairs("broken", {}), exact_pairs_behind(PROMPT, {})
    assert chi_squared_p(tokens // 5, law.reshape(5, 5).sum(axis=1)) > 1e-3, "the first token alone is right"
    assert chi_squared_p(tokens, law) < 1e-6
