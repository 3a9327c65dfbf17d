"""Two models that take turns, against whole forward passes of both and a plain loop over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.entropy_adaptive import entropy
from models.decoder import Decoder
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, forward, greedy_texts, texts
from tests.support.toy_law import cyclic_model

WIDTH = 64
INF = float("inf")


@pytest.fixture(scope="module")
def pair(tiny):
    """(large, small, params): the small model is the large one's first layer, somewhat off."""
    model, params = tiny
    small = Decoder(dataclasses.replace(model.config, blocks=model.config.blocks[:1]))
    first = {name: part for name, part in params.items() if name not in ("layers_1", "layers_2")}
    off = jax.tree.map(lambda x: x + 0.2 * jnp.std(x) * jax.random.normal(jax.random.key(3), x.shape), first)
    return model, small, WithDraft(params, off)


def run(pair, prompts=PROMPTS, call=None, **options):
    model, small, params = pair
    fn = make_decode_fn(model, "entropy_adaptive", max_new_tokens=ROOM, draft=small, **options)
    return fn(params, prompts, **(call or {}))


def bits(logits: np.ndarray) -> float:
    logits = np.asarray(logits, np.float64)
    law = np.exp(logits - logits.max())
    law /= law.sum()
    return float(-(law[law > 0] * np.log2(law[law > 0])).sum())


def reference(pair, threshold: float, window: int, dwell: int, large: bool) -> tuple[list[list[int]], list[str]]:
    """Returns (texts, who wrote each token as a string of L and S), one token at a time from whole forward passes."""
    model, small, params = pair
    found, writers = [], []
    for prompt in PROMPTS:
        row, entropies, writer, who, since = list(prompt), [], large, "", 0
        for _ in range(ROOM):
            padded = np.array([row + [0] * (WIDTH - len(row))], np.int32)
            network, weights = (model, params.target) if writer else (small, params.draft)
            logits = np.asarray(forward(network, weights, padded))[0, len(row) - 1]
            row.append(int(np.argmax(logits)))
            entropies.append(bits(logits))
            who += "L" if writer else "S"
            since += 1
            mean = np.mean(entropies[-window:])
            assert abs(mean - threshold) > 1e-5, "too close to call: choose another threshold"
            wanted = bool(mean >= threshold) if since >= dwell else writer
            since = since if wanted == writer else 0
            writer = wanted
        found.append(row[len(prompt) :])
        writers.append(who)
    return found, writers


def test_entropy_is_in_bits():
    vocab = 32
    flat, sharp = np.full(vocab, 3.0), np.where(np.arange(vocab) == 4, 0.0, -np.inf)
    some = np.random.default_rng(0).normal(size=vocab) * 3
    found = entropy(jnp.asarray(np.stack([flat, sharp, some, some + 100]), jnp.float32))
    np.testing.assert_allclose(found, [5.0, 0.0, bits(some), bits(some)], atol=1e-4)


@pytest.mark.parametrize(
    ("threshold", "window", "dwell", "start"), [(4.6, 5, 4, "small"), (5.0, 1, 1, "large"), (4.7, 3, 0, "small")]
)
def test_text_and_turns_equal_the_reference(pair, threshold, window, dwell, start):
    options = {"threshold": threshold, "window": window, "dwell": dwell, "start": start}
    expected, writers = reference(pair, threshold, window, dwell, start == "large")
    share = sum(who.count("L") for who in writers) / (ROOM * len(PROMPTS))
    assert 0.15 < share < 0.85 and max(who.count("SL") for who in writers) > 1, f"a dull case: {writers}"
    for eager in (False, True):
        output = run(pair, eager=eager, **options)
        assert texts(output) == expected
        np.testing.assert_array_equal(output.stats.accepted, [who.count("S") for who in writers])


def test_models_that_rest_catch_up_in_few_passes(pair):
    """A model reads each token at most once: what it missed in passes of up to 16, then one by one."""
    options = {"threshold": 4.6, "window": 5, "dwell": 4}
    _, writers = reference(pair, 4.6, 5, 4, large=False)
    lazy, eager = (run(pair, eager=eager, **options).stats for eager in (False, True))
    np.testing.assert_array_equal(eager.draft_calls, [ROOM] * len(PROMPTS))
    np.testing.assert_array_equal(eager.target_calls, lazy.target_calls)
    for row, who in enumerate(writers):
        for writer, calls in (("L", lazy.target_calls), ("S", lazy.draft_calls)):
            runs, missed = 0, 0
            for token in who:
                runs += -(-(missed + 1) // 16) if token == writer else 0
                missed = 0 if token == writer else missed + 1
            assert int(calls[row]) == runs, f"row {row}, {writer} in {who}"


def test_thresholds_that_never_and_always_call_the_large_model(pair):
    model, small, params = pair
    never = run(pair, threshold=INF)
    assert texts(never) == greedy_texts(small, params.draft, PROMPTS, ROOM)
    assert (np.asarray(never.stats.target_calls) == 0).all()
    always = run(pair, threshold=-INF, dwell=0, start="large")
    assert texts(always) == greedy_texts(model, params.target, PROMPTS, ROOM)
    assert (np.asarray(always.stats.draft_calls) == 0).all() and (np.asarray(always.stats.drafted) == 0).all()


@pytest.mark.parametrize("options", [{"threshold": 4.8, "dwell": 2}, {"random_share": 0.5, "dwell": 3}])
def test_a_model_and_its_copy_write_its_own_text(tiny, options):
    """So both caches must be right after every change of turns."""
    model, params = tiny
    output = run((model, model, WithDraft(params, params)), window=1, **options)
    assert texts(output) == greedy_texts(model, params, PROMPTS, ROOM)
    accepted = np.asarray(output.stats.accepted)
    assert (accepted > 0).any() and (accepted < ROOM).any()


def test_an_equal_entropy_calls_the_large_model():
    """All laws have one token only: 0 bits, exactly."""
    model, params = cyclic_model()
    sure = {**params, "unembedding": jax.tree.map(lambda x: 100 * x, params["unembedding"])}
    pair = model, model, WithDraft(sure, sure)
    at, above = (run(pair, [[1]], threshold=bits_, dwell=2).stats.accepted[0] for bits_ in (0.0, 0.001))
    assert (int(at), int(above)) == (2, ROOM)


def test_random_turns_go_by_blocks_and_reach_the_share(pair):
    rows = [[1, 2]] * 64
    output = run(pair, rows, random_share=0.25, dwell=4, call={"temperature": 1.0})
    by_large = ROOM - np.asarray(output.stats.accepted)
    assert (by_large % 4 == 0).all() and len(set(by_large.tolist())) > 2
    blocks = 64 * ROOM // 4
    assert abs(by_large.sum() / 4 / blocks - 0.25) < 4 * (0.25 * 0.75 / blocks) ** 0.5
    for share, expected in ((0.0, 0), (1.0, ROOM)):
        output = run(pair, rows[:2], random_share=share, dwell=4)
        assert (ROOM - np.asarray(output.stats.accepted) == expected).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": float("nan")}, "threshold must be"),
        ({"window": 0}, "window must be"),
        ({"dwell": -1}, "dwell at least 0"),
        ({"start": "medium"}, "start must be"),
        ({"random_share": 1.5}, "random_share must be"),
        ({"random_share": 0.5, "dwell": 0}, "random_share must be"),
    ],
)
def test_options_that_cannot_be(pair, options, message):
    with pytest.raises(InputError, match=message):
        run(pair, **options)


def test_both_models_read_one_prompt(pair):
    with pytest.raises(InputError, match="leave out draft_prompts"):
        run(pair, [[1, 2]], call={"draft_prompts": [[1]]})


def test_a_small_model_is_needed(tiny):
    with pytest.raises(InputError, match="second model"):
        make_decode_fn(tiny[0], "entropy_adaptive")
