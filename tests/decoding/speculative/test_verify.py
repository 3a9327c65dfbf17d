"""Every mode of `verify` against the exact law of a toy model, each beside a planted bug; and what must hold exactly.

The statistic: chi-squared of the first two tokens of 40,000 texts, where a correct verifier must pass and a planted bug
must fail clearly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sampling import Sampling, draw, process_logits, step_keys
from decoding.speculative.tree import Template, TokenTree, branching, chain
from tests.support.decode_reference import chi_squared_p
from tests.support.toy_law import (
    DRAWS,
    PARENTS,
    VOCAB,
    WIDTH,
    draft,
    drawn_pairs,
    exact_pairs,
    prefixes,
    run,
    settings,
    table,
    target_of,
)

P, Q = table(0), table(1)
SPARSE = np.where(np.sort(Q, axis=1)[:, -2:-1] <= Q, Q, 0.0)  # two tokens each: fewer than siblings asked for
SPARSE = (SPARSE / SPARSE.sum(axis=1, keepdims=True)).astype(np.float32)
UNEVEN = Template(((), (0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 1, 0)))
HOW = {"node": "top", "point": "top", "rrs_iid": "iid", "rrs_wor": "wor", "traversal": "wor"}
MODES = list(HOW)


def law_of(mode: str, tree: TokenTree, **changes: float) -> float:
    """Returns the p-value of the first two tokens under the exact law."""
    exact = exact_pairs(P, **changes)
    verified = run(mode, tree, P, settings(**changes))
    return chi_squared_p(drawn_pairs(verified, exact), exact)


def trees(template: Template, how: str, q: np.ndarray = Q) -> TokenTree:
    return draft(template, how, q)


def test_the_toy_is_worth_testing():
    exact = exact_pairs(P)
    assert np.isclose(exact.sum(), 1) and (exact * DRAWS > 5).sum() >= 14 and exact.max() < 0.4
    overlap = np.minimum(P, Q).sum(axis=1)
    assert 0.3 < overlap[0] < 0.9 and ((overlap > 0.3) & (overlap < 0.9)).mean() > 0.6


@pytest.mark.parametrize(
    ("mode", "template"),
    [
        ("node", branching((2, 2))),
        ("node", UNEVEN),
        ("point", branching((2, 2))),
        ("point", branching((3, 1))),
        ("rrs_iid", branching((2, 2))),
        ("rrs_iid", branching((3, 2))),
        ("rrs_wor", chain(2)),
        ("rrs_wor", branching((2, 2))),
        ("rrs_wor", branching((3, 2))),
        ("rrs_wor", UNEVEN),
        ("traversal", chain(1)),
        ("traversal", chain(3)),
        ("traversal", branching((2, 2))),
        ("traversal", UNEVEN),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.width}rows",
)
def test_what_is_emitted_has_the_targets_law(mode, template):
    assert law_of(mode, trees(template, HOW[mode])) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_law_is_that_of_the_rows_settings(mode):
    changes = {"temperature": 0.6, "top_p": 0.97, "repetition_penalty": 1.5}
    tree = trees(branching((2, 2)), HOW[mode])
    assert law_of(mode, tree, **changes) > 1e-3
    exact = exact_pairs(P, **(changes | {"repetition_penalty": 1.0}))
    verified = run(mode, tree, P, settings(**changes))
    assert chi_squared_p(drawn_pairs(verified, exact), exact) < 1e-6, "the penalty must matter"


@pytest.mark.parametrize("mode", ["rrs_wor", "rrs_iid", "traversal"])
def test_fewer_tokens_to_draw_than_siblings(mode):
    """Siblings behind the last one that the draft's law could give have probability 0 and are no trials."""
    assert law_of(mode, trees(branching((3, 2)), HOW[mode], SPARSE)) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("missing", ["parent", "token"])
def test_dead_rows_are_never_accepted_and_keep_the_law(mode, missing):
    tree = trees(branching((2, 2)), HOW[mode])
    odd = np.arange(DRAWS)[:, None] % 2 == 1
    dead = odd & np.isin(np.arange(WIDTH), [2, 4, 5, 6])[None, :]  # chosen without a look at the tokens
    if missing == "parent":
        tree = tree.replace(parent=np.where(dead, -1, tree.parent))
    else:
        tree = tree.replace(tokens=np.where(dead, -2, tree.tokens))
    exact, verified = exact_pairs(P), run(mode, tree, P)
    rows, count = verified.rows, verified.count
    assert np.isin(rows[1::2], [0, 1, 3]).all() and (rows[::2] > 3).any() and (count[1::2] == 3).any()
    assert chi_squared_p(drawn_pairs(verified, exact), exact) > 1e-3


PLANTED = {
    "top-k siblings tested as if drawn": ("rrs_wor", "top", Q),
    "siblings not in the order drawn": ("rrs_wor", "sorted", Q),
    "law not renormalised after a trial": ("rrs_iid", "wor", Q),
    "laws of another draft temperature": ("rrs_iid", "iid", Q**0.5 / (Q**0.5).sum(axis=1, keepdims=True)),
    "laws of another draft temperature, wor": ("rrs_wor", "wor", Q**2 / (Q**2).sum(axis=1, keepdims=True)),
    "top-k siblings in traversal": ("traversal", "top", Q),
    "siblings not in the order drawn, traversal": ("traversal", "sorted", Q),
    "laws of another draft temperature, traversal": ("traversal", "wor", Q**0.5 / (Q**0.5).sum(axis=1, keepdims=True)),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_law_is_lost_when_siblings_are_not_what_the_mode_takes_them_for(bug):
    mode, how, drawn_from = PLANTED[bug]
    tree = trees(branching((2, 2)), how, drawn_from.astype(np.float32))
    stated = Q[prefixes(tree, VOCAB)[:, :PARENTS]]
    assert law_of(mode, tree.replace(laws=stated)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_law_is_lost_with_another_last_token(mode):
    exact = exact_pairs(P)
    verified = run(mode, trees(branching((2, 2)), HOW[mode]), P)
    fresh = np.random.default_rng(0).choice(VOCAB, DRAWS, p=exact.reshape(VOCAB, VOCAB).sum(axis=1))
    for other in (fresh, np.full(DRAWS, P[0].argmax())):
        tokens = verified.tokens.copy()
        tokens[:, 0] = np.where(verified.count == 1, other, tokens[:, 0])
        assert chi_squared_p(drawn_pairs(verified.replace(tokens=tokens), exact), exact) < 1e-6


@pytest.mark.parametrize("mode", ["point", "node"])
def test_copies_of_a_sibling_count_once(mode):
    tree = trees(branching((3, 2)), "top")
    tree.tokens[:, 2] = tree.tokens[:, 1]
    verified = run(mode, tree, P)
    exact = exact_pairs(P)
    assert chi_squared_p(drawn_pairs(verified, exact), exact) > 1e-3
    assert not (verified.rows == 2).any()


@pytest.mark.parametrize("mode", ["rrs_wor", "rrs_iid", "traversal"])
def test_a_draft_equal_to_the_target_is_accepted_whole(mode):
    for template in (chain(3), branching((2, 2))):
        verified = run(mode, trees(template, HOW[mode], P), P)
        assert (verified.count == template.max_depth + 1).all()


@pytest.mark.parametrize("mode", ["rrs_wor", "rrs_iid", "traversal"])
def test_a_draft_that_shares_no_token_is_never_accepted(mode):
    low, high = np.eye(VOCAB)[:2].sum(axis=0), np.eye(VOCAB)[2:].sum(axis=0)
    p, q = (P * low / (P * low).sum(axis=1, keepdims=True)), (Q * high / (Q * high).sum(axis=1, keepdims=True))
    for template in (chain(3), branching((2, 2))):
        verified = run(mode, trees(template, HOW[mode], q.astype(np.float32)), p.astype(np.float32))
        assert (verified.count == 1).all() and (verified.tokens[:, 0] < 2).all()


@pytest.mark.parametrize("mode", ["rrs_wor", "node", "point", "traversal"])
def test_the_whole_vocabulary_as_children_always_has_one_to_accept(mode):
    verified = run(mode, trees(branching((VOCAB, 2)), HOW[mode]), P)
    assert (verified.count >= 2).all()


def test_on_a_chain_the_modes_are_relatives():
    tree = trees(chain(3), "wor")
    wor, iid, traversal = (run(mode, tree, P) for mode in ("rrs_wor", "rrs_iid", "traversal"))
    for name in ("rows", "tokens", "count"):
        np.testing.assert_array_equal(getattr(wor, name), getattr(iid, name))
    assert traversal.count.mean() > wor.count.mean() + 0.01
    siblings = trees(branching((2, 2)), "wor")
    assert not np.array_equal(run("rrs_wor", siblings, P).tokens, run("rrs_iid", siblings, P).tokens)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_rows_walk_the_most_likely_tokens_whoever_shares_their_batch(mode):
    tree = trees(branching((3, 2)), "iid" if mode == "rrs_iid" else "wor")
    tree = tree if HOW[mode] != "top" else tree.replace(laws=None)
    parent, tokens = tree.parent[0], tree.tokens
    sampled = np.arange(DRAWS) % 2 == 1
    greedy = run(mode, tree, P, settings(temperature=0.0))
    mixed = run(mode, tree, P, settings(temperature=sampled))
    for row in range(0, 200, 2):
        path, prefix, text = [0], 0, []
        while True:
            text.append(int(P[prefix].argmax()))
            prefix = prefix * VOCAB + 1 + text[-1]
            below = [i for i in range(1, len(parent)) if parent[i] == path[-1] and tokens[row, i] == text[-1]]
            if not below:
                break
            path.append(below[0])
        count = int(greedy.count[row])
        assert greedy.tokens[row, :count].tolist() == text and greedy.rows[row, :count].tolist() == path
    assert len(set(greedy.count.tolist())) == 3
    for name in ("tokens", "count", "rows"):
        np.testing.assert_array_equal(getattr(greedy, name)[~sampled], getattr(mixed, name)[~sampled])
    exact = exact_pairs(P)
    rows = jax.tree.map(lambda x: x[1::2], mixed)
    assert chi_squared_p(drawn_pairs(rows, exact), exact) > 1e-3


@jax.jit
def plain_step(prefix: jax.Array, seen: jax.Array, keys: jax.Array, sampling: Sampling) -> tuple[jax.Array, ...]:
    """One step of plain sampling from the table P: (new prefix, new seen, token)."""
    token = draw(process_logits(jnp.log(jnp.asarray(P))[prefix], sampling, seen), keys)
    return prefix * VOCAB + 1 + token, seen.at[jnp.arange(DRAWS), token].set(True), token


def test_node_writes_what_plain_sampling_draws():
    tree = trees(branching((3, 2)), "top")
    sampling = settings(temperature=0.8, repetition_penalty=1.2)
    target = target_of(P, tree, sampling)
    verified = run("node", tree, P, sampling)
    prefix, seen = np.zeros(DRAWS, np.int32), target.seen
    for depth in range(3):
        prefix, seen, token = plain_step(prefix, seen, step_keys(target.keys, target.lengths + depth), sampling)
        live = verified.count > depth
        assert live.sum() > 1000
        np.testing.assert_array_equal(verified.tokens[live, depth], np.asarray(token)[live])
