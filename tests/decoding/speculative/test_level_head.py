"""Heads that guess level by level: dynamic trees of theirs, whose rows know their own paths alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.prefill import hidden_observer, observed_prefill, pad_prompts
from decoding.speculative.clover import CloverOptions
from decoding.speculative.dynamic_tree import Growth, Level, dynamic_tree
from decoding.speculative.eagle import EAGLE_HEAD, EagleConfig, EagleOptions, eagle_head
from decoding.speculative.level_head import guesser, read_prompts
from decoding.speculative.sizing import LatencyCurve
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts, texts

CHAIN = ((0.9,) + (0.0,) * 9,) * 3  # only first guesses are ever right


@pytest.fixture(scope="module")
def both(tiny) -> WithDraft:
    """The tiny model and a head of random weights, good for some guesses."""
    values = EAGLE_HEAD.init(EagleConfig(), *tiny, jax.random.key(1))
    return WithDraft(
        tiny[1], jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), values)
    )


def test_rows_of_a_tree_know_their_own_paths_alone(tiny, both):
    """Every row's log-value is that of its path read alone, one row after the other."""
    model, params = tiny
    head, prompts = eagle_head(model), pad_prompts(PROMPTS[2:4], 61)
    prompts = prompts.replace(seen=observed_prefill(model, params, prompts, 64, observer=hidden_observer(32))[1])
    state = read_prompts(head, model, both, prompts, 64)
    last = jnp.asarray([prompt[-1] for prompt in PROMPTS[2:4]], jnp.int32)

    def grow(both, state):
        guess = guesser(head, model, both, last)
        return dynamic_tree(Growth(12, 4, 3), last, guess, (state.last[:, None], state.cache))

    tree, value = jax.jit(grow)(both, state)

    @jax.jit
    def alone(tokens):
        guess = guesser(head, model, both, last)
        logits, carry = guess(None, (state.last[:, None], state.cache))
        found = []
        for depth in range(1, 5):
            law = jax.nn.log_softmax(logits[:, 0], axis=-1)
            found.append(jnp.take_along_axis(law, tokens[:, depth - 1 : depth], axis=1)[:, 0])
            if depth < 4:
                own, steps = jnp.ones((1, 1, depth), bool), jnp.arange(depth)[None]
                logits, carry = guess(
                    Level(depth, tokens[:, depth - 1 : depth], jnp.zeros((1, 1), int), own, steps), carry
                )
        return jnp.cumsum(jnp.stack(found, axis=1), axis=1)

    assert int(tree.depth.max()) == 4
    for row in range(1, 13):
        tokens = np.zeros((2, 4), np.int32)
        for text in range(2):
            above = np.flatnonzero(tree.ancestors[text, row])[1:]
            tokens[text, : len(above)] = tree.tokens[text, above]
        sums = alone(jnp.asarray(tokens))
        for text in range(2):
            expected = sums[text, int(tree.depth[text, row]) - 1]
            np.testing.assert_allclose(value[text, row], expected, rtol=1e-3, atol=1e-3)


def test_dynamic_trees_write_the_greedy_text(tiny, both):
    expected = greedy_texts(*tiny, PROMPTS, ROOM)
    fn = make_decode_fn(tiny[0], "eagle", max_new_tokens=ROOM, tree="dynamic", nodes=10, beam=3)
    output = fn(both, PROMPTS)
    assert texts(output) == expected and int(output.stats.accepted.sum()) > 8
    assert (output.stats.drafted == 10 * output.stats.steps).all()


def test_a_beam_of_one_is_the_static_chain(tiny, both):
    model, _ = tiny
    dynamic = make_decode_fn(model, "eagle", max_new_tokens=ROOM, tree="dynamic", nodes=9, beam=1, offsets=3)
    static = make_decode_fn(model, "eagle", max_new_tokens=ROOM, nodes=3, offsets=3, accuracy=CHAIN)
    ours, theirs = dynamic(both, PROMPTS), static(both, PROMPTS)
    assert texts(ours) == texts(theirs) and int(ours.stats.accepted.sum()) > 0
    jax.tree.map(np.testing.assert_array_equal, ours.stats, theirs.stats)


def test_settings_out_of_range():
    with pytest.raises(InputError, match="unknown tree 'dynamical'. Did you mean 'dynamic'?"):
        EagleOptions(tree="dynamical")
    with pytest.raises(InputError, match="beam must be at least 1, got 0"):
        EagleOptions(beam=0)
    with pytest.raises(InputError, match="latency sizes static trees"):
        EagleOptions(tree="dynamic", latency=LatencyCurve((1, 4), (1.0, 1.0)))
    with pytest.raises(InputError, match="beam shapes dynamic trees alone: leave it out, or set tree to dynamic"):
        EagleOptions(beam=3)
    with pytest.raises(InputError, match="share shapes dynamic trees alone"):
        CloverOptions(tree="static", share=0.5)
