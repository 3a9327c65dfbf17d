"""Drafts in rows with grammars: nothing outside is proposed, and what is written is plain constrained decoding's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.grammar import lark, regex
from decoding.grammar.bitmask import unpack
from decoding.grammar.rows import read_grammars
from decoding.grammar.trees import inside
from decoding.speculative import loop
from decoding.speculative.tree import branching
from decoding.state import init_state
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, greedy_texts, row_seeds, texts
from tests.support.grammars import STOP, small_vocabulary

ROOM = 24
VOCABULARY = small_vocabulary()
TABLES = [regex(pattern, VOCABULARY) for pattern in ("(?:ab|ba|1){20,60}", "[0-9]{30,40}", "[a-e]{3,9}")]
ENGINE = [
    lark("start: /(ab|ba|1){20,60}/", VOCABULARY),
    lark("start: NUM | start (/[+]/ | /[-]/) NUM\nNUM: /[0-9]{1,2}/", VOCABULARY),
]
ROWS = {
    "tables": [TABLES[0], None, TABLES[1], TABLES[2]] * 2,
    "engine": [ENGINE[0], None, ENGINE[1], TABLES[1]] * 2,
}
METHODS = {"prompt_lookup": {"longest": 2, "length": 5}, "token_recycling": {"width": 20}}


@pytest.fixture(scope="module")
def constrained(tiny):
    return make_decode_fn(tiny[0], "constrained", max_new_tokens=ROOM, stop_tokens=[STOP])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_the_text_is_that_of_plain_constrained_decoding(tiny, constrained, method, rows):
    fn = make_decode_fn(tiny[0], method, max_new_tokens=ROOM, stop_tokens=[STOP], **METHODS[method])
    expected = texts(constrained(tiny[1], PROMPTS, grammars=ROWS[rows]))
    output = fn(tiny[1], PROMPTS, grammars=ROWS[rows])
    assert texts(output) == expected
    stats = jax.tree.map(np.asarray, output.stats)
    assert (stats.accepted <= stats.drafted).all() and stats.accepted[[0, 2, 3]].sum() > 3, (
        "drafts in grammars must be of use"
    )
    assert texts(fn(tiny[1], PROMPTS[2:3], grammars=ROWS[rows][2])) == expected[2:3]
    if rows == "tables":
        warm = {"temperature": 0.9, "top_p": 0.95}
        sampled = constrained(tiny[1], PROMPTS, row_seeds(), grammars=ROWS[rows], **warm)
        assert texts(fn(tiny[1], PROMPTS, row_seeds(), grammars=ROWS[rows], **warm)) == texts(sampled)


def test_masks_alone_do_not_do(tiny, constrained, monkeypatch):
    """A planted bug: the constraint stays where it was, as if nothing had been emitted."""
    monkeypatch.setattr(loop, "along", lambda constraint, tokens, count: constraint)
    fn = make_decode_fn(tiny[0], "prompt_lookup", max_new_tokens=ROOM, stop_tokens=[STOP], length=4)
    rows = [regex("abc[0-9]{9}", VOCABULARY)] * 8
    assert texts(fn(tiny[1], PROMPTS, grammars=rows)) != texts(constrained(tiny[1], PROMPTS, grammars=rows))


def test_without_grammars_nothing_changes(tiny):
    fn = make_decode_fn(tiny[0], "prompt_lookup", max_new_tokens=ROOM)
    assert texts(fn(tiny[1], PROMPTS)) == greedy_texts(*tiny, PROMPTS, ROOM)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_outside_the_grammar_are_taken_out_with_all_behind_them(rows):
    """Random trees against a matcher that is asked for every path alone."""
    template = branching((4, 3, 2))
    grammars = ROWS[rows]
    begun = [VOCABULARY.tokens.index(token) for token in (b"ab", b"a", b"12", b"c")] * 2
    begun[3] = VOCABULARY.tokens.index(b"c" if rows == "tables" else b"1")
    state = init_state(None, jnp.asarray(begun), jnp.full(8, ROOM), ROOM, 4, None)
    state = state.replace(tokens=state.tokens.at[:, 0].set(jnp.asarray(begun)), lengths=jnp.ones(8, jnp.int32))
    state = state.replace(done=jnp.arange(8) == 7)
    constraint = read_grammars(grammars, 8, 61, (STOP,))
    constraint = jax.tree.map(jnp.asarray, constraint).after(jnp.asarray(begun), jnp.zeros(8, bool))
    rng = np.random.default_rng(0)
    likely = [VOCABULARY.tokens.index(token) for token in (b"ab", b"ba", b"1", b"a", b"+", b"12", b"c")] + [STOP]
    tokens = rng.choice(likely, (8, template.width)).astype(np.int32)
    tokens[:, 0] = begun
    masks, tree, lost = jax.jit(lambda tokens: inside(constraint, state, template.tree(tokens), 3, 61, (STOP,)))(tokens)
    allowed = np.asarray(unpack(masks.words.reshape(-1, 2), 61)).reshape(8, -1, 61)
    kept = np.asarray(tree.parent) >= 0
    for row, grammar in enumerate(grammars[:7]):
        for node in range(1, template.width):
            path: list[int] = []
            at = node
            while at > 0:
                path.insert(0, int(tokens[row, at]))
                at = int(template.parent[at])
            body, ends = (path[:-1], True) if path[-1] == STOP else (path, False)
            wanted = STOP not in body
            if grammar is not None and wanted:
                matcher = grammar.matcher()
                wanted = all(matcher.consume(token) for token in [begun[row], *body])
                wanted = wanted and (not ends or grammar.accepts([begun[row], *body]))
            assert kept[row, node] == wanted, (row, path)
            if wanted and not ends and grammar is not None:
                words = np.zeros(2, np.uint32)
                assert matcher.fill(words) == bool(masks.ends[row, node])
                np.testing.assert_array_equal(
                    allowed[row, node], np.unpackbits(words.view(np.uint8), bitorder="little")[:61]
                )
        assert int(lost[row]) == template.width - 1 - kept[row].sum()
    assert kept[0].any() and not kept[0, 1:].all()


def test_methods_that_take_no_grammars_say_who_does(tiny):
    with pytest.raises(InputError, match="takes no grammars: use .*prompt_lookup, token_recycling"):
        make_decode_fn(tiny[0], "rsd_c", draft=tiny[0], stop_tokens=[STOP]).inputs(PROMPTS, grammars=TABLES[0])
