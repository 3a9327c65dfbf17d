"""Every policy with drafts, with sampling, and in rows that share a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import make_decode_fn
from decoding.plan import decode
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, row_seeds, texts

ALL = {  # every token is read
    "lserve": {"budget": 64, "page": 8, "logical": 4},
    "streaming": {"sink": 4, "local": 64},
    "tidal": {"budget": 64, "select": (0,)},
}
FEW = {
    "lserve": {"budget": 12, "page": 4, "logical": 2, "reuse": 2, "gates": ((0.1, 0.9), (0.0, 0.0), (0.8, 0.2)),
               "sink": 1, "local": 4},
    "streaming": {"sink": 2, "local": 4},
    "tidal": {"budget": 6, "select": (0,)},
}  # fmt: skip
REPEATING = [prompt + prompt for prompt in PROMPTS[:4]]  # something to look up


@pytest.fixture(scope="module")
def greedy(tiny) -> list[list[int]]:
    return texts(make_decode_fn(tiny[0], max_new_tokens=ROOM)(tiny[1], REPEATING))


@pytest.mark.parametrize("method", ALL)
def test_drafts_change_no_text_where_every_token_is_read(tiny, greedy, method):
    fn = make_decode_fn(tiny[0], method, max_new_tokens=ROOM, drafted=3, **ALL[method])
    output = fn(tiny[1], REPEATING)
    assert texts(output) == greedy
    assert np.sum(output.stats.accepted) > 0, "no draft was ever right: the test says little"
    assert np.sum(output.stats.steps) < np.sum(output.stats.emitted)


@pytest.mark.parametrize("method", FEW)
def test_rows_with_drafts_and_few_tokens_do_not_depend_on_their_batch(tiny, method):
    fn = make_decode_fn(tiny[0], method, max_new_tokens=ROOM, drafted=3, **FEW[method])
    settings = {"temperature": 0.8, "top_p": 0.9}
    together = texts(fn(tiny[1], REPEATING, row_seeds(4), **settings))
    assert {len(text) for text in together} == {ROOM}
    for row in (1, 2):  # a batch of copies, which needs no compiling
        copies = fn(tiny[1], [REPEATING[row]] * 4, row_seeds(4)[row : row + 1] * 4, **settings)
        assert texts(copies) == [together[row]] * 4


@pytest.mark.parametrize("method", ALL)
def test_sampling_where_every_token_is_read_is_plain_sampling(tiny, method):
    settings = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2}
    plain = make_decode_fn(tiny[0], "sample", max_new_tokens=ROOM)(tiny[1], PROMPTS, row_seeds(), **settings)
    fn = make_decode_fn(tiny[0], method, max_new_tokens=ROOM, **ALL[method])
    assert texts(fn(tiny[1], PROMPTS, row_seeds(), **settings)) == texts(plain)


@pytest.mark.parametrize("method", FEW)
@pytest.mark.parametrize("drafted", [0, 2])
def test_bfloat16_parameters(tiny, method, drafted):
    fn = make_decode_fn(tiny[0], method, max_new_tokens=ROOM, drafted=drafted, **FEW[method])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tiny[1])
    prompts, call = fn.inputs(PROMPTS)
    output = jax.eval_shape(lambda *args: decode(fn.plan, *args), params, prompts, call)
    assert output.tokens.shape == (len(PROMPTS), ROOM)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("streaming", {"drafted": -1}, r"drafted must be 0 \(no drafts\) or more tokens, got -1"),
        ("lserve", {"drafted": 64}, r"drafted must be below page \(64 tokens\) and 256, got 64"),
        ("tidal", {"drafted": 2, "correct_every": 8}, "leave out drafted, or correct_every"),
    ],
)
def test_drafts_that_do_not_fit_are_refused(tiny, method, options, message):
    with pytest.raises(InputError, match=message):
        make_decode_fn(tiny[0], method, **options)
