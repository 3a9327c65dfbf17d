"""TidalDecode against a slow reference and against dense decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.autoregressive import DENSE
from decoding.method import Policy
from decoding.sparse import tidal
from decoding.sparse.tidal import TidalOptions, chosen_slots, layer_roles, make_tidal, tidal_attend
from models.attention import TreeRows, tree_attend
from models.cache import init_cache
from models.errors import InputError
from tests.support.decode_reference import texts
from tests.support.sparse_reference import Rule, SlowRow, deep_model, fast_logits, slow_logits, with_garbage

LENGTHS = (1, 30, 13, 47)
PROMPTS = [np.random.default_rng(length).integers(0, 61, length).tolist() for length in LENGTHS]
SELECT = (0, 2)  # of layers 0 to 4; 3 has a window, 1 and 4 are sparse
NEW = 10


class TidalRule(Rule):
    """Layers before the first of `select` see everything; the others what the last of these chose."""

    def __init__(self, budget: int, grouped: bool, select: tuple[int, ...] = SELECT):
        self.budget, self.grouped, self.select = budget, grouped, select

    def start(self) -> None:
        self.chosen = None

    def choose(self, layer, config, q, keys):
        if layer in self.select:
            group = config.num_heads // config.num_kv_heads
            scores = np.stack([keys[:, head // group] @ q[head] for head in range(config.num_heads)])
            if self.grouped:
                weights = np.exp((scores - scores.max(axis=1, keepdims=True)) * config.head_dim**-0.5)
                weights /= weights.sum(axis=1, keepdims=True)
                scores = np.repeat(weights.reshape(-1, group, len(keys)).sum(axis=1), group, axis=0)
            self.chosen = np.zeros(scores.shape, bool)
            self.chosen[:, -1] = True
            for head in range(config.num_heads):
                best = np.argsort(-scores[head, :-1], kind="stable")[: self.budget - 1]
                self.chosen[head, best] = True
        if self.chosen is None or layer in self.select:
            return super().choose(layer, config, q, keys)
        return self.chosen


@pytest.fixture(scope="module")
def deep():
    return deep_model()


def policy(model, budget: int, grouped: bool, select=SELECT) -> Policy:
    return Policy(tidal_attend(layer_roles(model.config, select), budget, grouped))


@pytest.fixture(scope="module")
def forced() -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 61, (len(PROMPTS), NEW)).tolist()


@pytest.fixture(scope="module")
def dense_logits(deep, forced):
    return fast_logits(*deep, DENSE, PROMPTS, forced)


@pytest.mark.parametrize("grouped", [False, True])
def test_equals_the_slow_reference_on_a_ragged_batch(deep, forced, dense_logits, grouped):
    fast = fast_logits(*deep, policy(deep[0], 6, grouped), PROMPTS, forced)
    for row, prompt in enumerate(PROMPTS):
        slow = slow_logits(*deep, TidalRule(6, grouped), prompt, forced[row])
        np.testing.assert_allclose(fast[row], slow, rtol=1e-3, atol=1e-3)
    assert np.abs(fast - dense_logits).max() > 0.5, "the budget must cost something, or the test says nothing"


def test_the_comparison_sees_a_choice_that_is_kept_too_long(deep, forced):
    """A planted bug: the second selection layer leaves the first one's choice in place."""
    roles = layer_roles(deep[0].config, SELECT)
    broken = tuple("full" if index == SELECT[1] else role for index, role in enumerate(roles))
    assert roles == ("select", "sparse", "select", "window", "sparse")
    fast = fast_logits(*deep, Policy(tidal_attend(broken, 6, False)), PROMPTS, forced)
    slow = slow_logits(*deep, TidalRule(6, False), PROMPTS[1], forced[1])
    assert np.abs(fast[1] - slow).max() > 0.1


@pytest.mark.parametrize("grouped", [False, True])
def test_with_every_token_chosen_it_is_dense(deep, forced, dense_logits, grouped):
    fast = fast_logits(*deep, policy(deep[0], 96, grouped), PROMPTS, forced)
    np.testing.assert_allclose(fast, dense_logits, rtol=1e-5, atol=2e-5)


def test_with_every_token_chosen_it_writes_greedy_text(tiny):
    model, params = tiny
    greedy = make_decode_fn(model, max_new_tokens=24)(params, PROMPTS)
    for grouped in (False, True):
        fn = make_decode_fn(model, "tidal", max_new_tokens=24, budget=96, select=[0], grouped=grouped)
        assert texts(fn(params, PROMPTS)) == texts(greedy)


def test_its_text_is_what_the_slow_reference_would_write(deep):
    options = {"budget": 5, "select": SELECT, "correct_every": 4}
    output = texts(make_decode_fn(deep[0], "tidal", max_new_tokens=NEW, **options)(deep[1], PROMPTS))
    for prompt, text in zip(PROMPTS, output, strict=True):
        logits = slow_logits(*deep, TidalRule(5, False), prompt, text, every=4)
        assert (logits[np.arange(NEW), text] > logits.max(axis=1) - 1e-3).all()


def test_corrections_are_calls_of_the_target_and_never_come_in_a_short_text(deep):
    calls = {}
    for every in (None, 4, 512):
        fn = make_decode_fn(deep[0], "tidal", max_new_tokens=9, budget=5, select=SELECT, correct_every=every)
        calls[every] = np.asarray(
            fn(deep[1], PROMPTS, max_new_tokens=[9] * (len(PROMPTS) - 1) + [2]).stats.target_calls
        )
    np.testing.assert_array_equal(calls[4] - calls[None], [2] * (len(PROMPTS) - 1) + [0])
    np.testing.assert_array_equal(calls[512], calls[None])


def test_layers_before_the_first_choice_are_those_of_dense_decoding(deep):
    model, params = deep
    cache = init_cache([block.attention for block in model.config.blocks], 2, 40, jnp.float32)
    cache = jax.tree.map(lambda x: x / 1e3 if x.ndim == 4 else jnp.array([20, 33]), with_garbage(cache))
    rows = TreeRows(jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    hidden = []
    for attend in (tree_attend, policy(model, 4, False, (2,)).attend):
        run = jax.jit(functools.partial(model.apply, attend=attend, collect=tuple(range(6))))
        hidden.append(run({"params": params}, jnp.array([[3], [4]]), cache=cache, ctx=rows).hidden)
    for layer in range(4):  # layer 2 chooses, after which its own output is still dense
        np.testing.assert_array_equal(hidden[1][layer], hidden[0][layer])
    assert np.abs(hidden[1][5] - hidden[0][5]).max() > 0.01


def corrected_states(model, params, every: int | None, steps: int):
    """Yields the state after each step of a small budget."""
    options = TidalOptions(budget=3, select=SELECT, correct_every=every)
    fn = make_decode_fn(model, "tidal", max_new_tokens=steps + 1, budget=3, select=SELECT, correct_every=every)
    state = fn.start(params, *fn.inputs(PROMPTS))
    step = jax.jit(make_tidal(model, options, ()).step)
    for _ in range(steps):
        state = step(params, state)
        yield state


def dense_keys(model, params, prompt: list[int], text: list[int]) -> np.ndarray:
    """Returns f[L, n, K, Dh]: the keys of a dense pass over prompt and text."""
    row = SlowRow(model, params)
    row.read([*prompt, *text], Rule())
    return np.stack([np.stack(keys) for keys in row.keys])


def wrong_keys(model, params, state, row: int) -> np.ndarray:
    """Returns bool[n]: tokens of a row whose keys in the cache are not those of dense decoding."""
    length = int(state.cache.length[row])
    text = np.asarray(state.tokens)[row, : int(state.lengths[row])].tolist()
    expected = dense_keys(model, params, PROMPTS[row], text)[:, :length]
    actual = np.stack([np.swapaxes(np.asarray(k[row]), 0, 1)[:length] for k in state.cache.k])
    return (np.abs(actual - expected) > 1e-3).any(axis=(0, 2, 3))


def test_correction_after_every_step_keeps_the_cache_of_dense_decoding(deep):
    last = list(corrected_states(*deep, 1, 5))[-1]
    for row in range(len(PROMPTS)):
        assert not wrong_keys(*deep, last, row).any()


def test_correction_mends_what_was_read_since_the_last(deep):
    for steps, state in enumerate(corrected_states(*deep, 3, 7), 1):
        wrong = wrong_keys(*deep, state, 1)
        prompt = len(PROMPTS[1])
        assert not wrong[: prompt - 1 + steps // 3 * 3].any()
        assert bool(wrong[prompt - 1 + steps // 3 * 3 :].any()) == bool(steps % 3), f"after {steps} steps"


def test_correction_reads_in_chunks(deep, monkeypatch):
    monkeypatch.setattr(tidal, "CHUNK", 2)
    monkeypatch.setattr("decoding.prefill.CHUNK", 2)
    last = list(corrected_states(*deep, 4, 4))[-1]
    assert not wrong_keys(*deep, last, 3).any()


@pytest.mark.parametrize("grouped", [False, True])
def test_chosen_slots_are_the_best_committed_ones_in_any_order_of_slots(grouped):
    rng = np.random.default_rng(3)
    scores = jnp.asarray(rng.normal(size=(2, 2, 3, 1, 40)), jnp.float32).at[:, :, :, :, 25:].add(50.0)
    start = jnp.array([25, 7])
    weights = jax.nn.softmax(jnp.where(jnp.arange(40)[None, None, None, None] < start[:, None, None, None, None],
                                       scores, -1e30), axis=-1)  # fmt: skip
    slots = np.asarray(chosen_slots(scores, weights, start, 9, grouped))
    ranks = np.asarray(weights)[:, :, :, 0]
    ranks = ranks.sum(axis=2) if grouped else ranks.reshape(2, 6, 40)
    for row, committed in enumerate((25, 7)):
        for head, best in enumerate(slots[row, 0]):
            assert set(best[:committed]) == set(np.argsort(-ranks[row, head, :committed])[:9])
    order = rng.permutation(25)
    moved = jnp.concatenate([scores[..., order], scores[..., 25:]], axis=-1)
    heavy = jnp.concatenate([weights[..., order], weights[..., 25:]], axis=-1)
    again = np.asarray(chosen_slots(moved, heavy, start, 9, grouped))
    np.testing.assert_array_equal(np.sort(order[again[0]]), np.sort(slots[0]))


def test_rows_of_a_tree_choose_each_for_itself(deep):
    """Two siblings behind a root: with all tokens chosen they equal dense attention; none sees another's choice."""
    model, params = deep
    prompt = jnp.asarray([PROMPTS[3]], jnp.int32)
    cache = init_cache([block.attention for block in model.config.blocks], 1, 64, jnp.float32)
    cache = jax.jit(model.apply)({"params": params}, prompt, cache=cache).cache.replace(length=jnp.array([47]))

    def read(attend, *tokens):
        ancestors = jnp.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)[:, : len(tokens), : len(tokens)]
        rows = TreeRows(ancestors, jnp.array([[0, 1, 1]])[:, : len(tokens)])
        run = jax.jit(functools.partial(model.apply, attend=attend))
        output = run({"params": params}, jnp.array([tokens]), 47 + rows.depth, cache, ctx=rows)
        assert output.aux.memory is None
        return np.asarray(output.logits[0])

    np.testing.assert_allclose(read(policy(model, 60, False).attend, 5, 7, 9), read(tree_attend, 5, 7, 9), atol=2e-5)
    few = policy(model, 6, False).attend
    tree, swapped = read(few, 5, 7, 9), read(few, 5, 9, 7)
    np.testing.assert_allclose(tree[:1], read(few, 5), atol=1e-4)
    np.testing.assert_allclose(tree[:2], read(few, 5, 7), atol=1e-4)
    np.testing.assert_allclose(tree[[0, 2, 1]], swapped, atol=1e-4)
    assert np.abs(tree - read(tree_attend, 5, 7, 9)).max() > 0.1


def test_roles(deep):
    full, window, select, sparse = "full", "window", "select", "sparse"
    assert layer_roles(deep[0].config, None) == (full, full, select, window, sparse)
    assert layer_roles(deep[0].config, (1, 2)) == (full, select, select, window, sparse)
    block = deep[0].config.blocks[0]
    for num_layers, chosen in ((32, [2, 13]), (16, [2, 6]), (4, [2]), (3, [1]), (2, [0])):
        config = dataclasses.replace(deep[0].config, blocks=(block,) * num_layers)
        assert [index for index, role in enumerate(layer_roles(config, None)) if role == select] == chosen
    with pytest.raises(InputError, match="this model has 1 such layers: take method 'sample'"):
        layer_roles(dataclasses.replace(deep[0].config, blocks=(block,)), None)
    other = dataclasses.replace(block, attention=dataclasses.replace(block.attention, num_heads=2))
    with pytest.raises(InputError, match="layers of different numbers of heads cannot share"):
        layer_roles(dataclasses.replace(deep[0].config, blocks=(block, block, block, other)), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1}, "budget must be at least 2 tokens"),
        ({"select": [3]}, r"without a sliding window, of which this model has \[0, 1, 2, 4\]; got \[3\]"),
        ({"select": [2, 5]}, r"got \[2, 5\]"),
        ({"select": []}, r"got \[\]"),
        ({"select": [4]}, r"behind the selection layers \[4\] no layer is left .* name earlier ones of \[0, 1, 2, 4\]"),
        ({"correct_every": 0}, "correct_every must be 1 to 512 steps, or a multiple of 512; got 0"),
        ({"correct_every": 600}, "got 600"),
    ],
)
def test_wrong_options_are_refused(deep, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(deep[0], "tidal", **options)
