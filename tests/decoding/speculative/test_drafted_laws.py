"""Whole methods with a bug planted in the drafter: proposals that are not what the verifier takes them for.

Chi-squared of the first tokens of 40,000 texts, by trees of one level. That the drafters as they are keep the law, of
two tokens and by deeper trees, is tested for the whole registry in `tests/decoding/test_contract.py`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.plan import decode
from decoding.speculative import dyspec, rsd, specdec_pp, speculative_sampling
from decoding.speculative.draft_model import draw_children, draw_next
from decoding.speculative.dyspec import pruned
from decoding.speculative.rsd import next_beams
from tests.support.decode_reference import chi_squared_p, exact_pairs_behind, noisy, small_law_model

DRAWS = 40_000
PROMPT = [2, 0, 3]
METHODS = {
    "dyspec": (dyspec, {"budget": 2, "frontier": 3, "depth": 1, "children": 3}),
    "rsd_c": (rsd, {"children": (3,)}),
    "rsd_s": (rsd, {"beams": 3, "depth": 1}),
    "specdec_pp": (specdec_pp, {"stop": "entropy", "shortest": 1, "longest": 1}),
    "speculative_sampling": (speculative_sampling, {"length": 1}),
}


def p_value(method: str) -> float:
    """Returns the p-value of a method's tokens under the exact law. It is traced anew, with a bug if there is one."""
    model, params = small_law_model()
    fn = make_decode_fn(model, method, max_new_tokens=1, draft=model, **METHODS[method][1])
    inputs = fn.inputs([PROMPT] * DRAWS, 1, temperature=1.0)
    output = jax.jit(functools.partial(decode, fn.plan))(WithDraft(params, noisy(params, 0.3)), *inputs)
    vocab = model.config.vocab_size
    law = exact_pairs_behind(PROMPT, {}).reshape(vocab, vocab).sum(axis=1)
    return chi_squared_p(np.asarray(output.tokens)[:, 0], law)


def flat(law: jax.Array) -> jax.Array:
    """Another law: that of twice the temperature."""
    return jnp.sqrt(law) / jnp.sqrt(law).sum(axis=-1, keepdims=True)


def stated_too_flat(logits, round_, step, temperature):
    token, law = draw_next(logits, round_, step, temperature)
    return token, flat(law)


def drawn_too_flat(law, *rest):
    return draw_children(flat(law), *rest)


def likeliest(law, count, keys, ranked):
    return draw_children(law, count, keys, jnp.ones_like(ranked))


def beam_search(law, log_q, perturbed, beams, keys, ranked):
    return next_beams(law, log_q, perturbed, beams, keys, jnp.ones_like(ranked))


def beams_by_token(*arguments):
    beams = next_beams(*arguments)
    order = jnp.argsort(beams[1], axis=1)
    return tuple(jnp.take_along_axis(values, order, axis=1) for values in beams)


def looked_at_before_pruning(tree, laws, width):
    return pruned(tree.replace(value=jnp.where(jnp.isinf(tree.value), tree.value, tree.reached)), laws, width)


def with_replacement(law, count, keys, ranked):
    shape = (law.shape[1], count)
    tokens = jax.vmap(lambda key, logits: jax.random.categorical(key, logits[:, None], shape=shape))(keys, jnp.log(law))
    return tokens, jnp.ones(tokens.shape, bool)


def test_copies_among_siblings_cost_no_law(monkeypatch):
    """Siblings that are drawn with replacement, their copies left out, are a draw without: copies must be no trials."""
    monkeypatch.setattr(rsd, "draw_children", with_replacement)
    assert p_value("rsd_c") > 1e-3


BUGS: list[tuple[str, Callable]] = [
    ("dyspec", likeliest),
    ("dyspec", looked_at_before_pruning),
    ("rsd_c", drawn_too_flat),
    ("rsd_c", likeliest),
    ("rsd_s", beam_search),
    ("rsd_s", beams_by_token),
    ("specdec_pp", stated_too_flat),
    ("speculative_sampling", stated_too_flat),
]
REPLACES = {
    **dict.fromkeys((drawn_too_flat, likeliest), "draw_children"),
    **dict.fromkeys((beam_search, beams_by_token), "next_beams"),
    looked_at_before_pruning: "pruned",
    stated_too_flat: "draw_next",
}


@pytest.mark.parametrize(("method", "bug"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_the_law_is_lost_with_a_bug_in_the_drafter(monkeypatch, method, bug):
    monkeypatch.setattr(METHODS[method][0], REPLACES[bug], bug)
    assert p_value(method) < 1e-6
