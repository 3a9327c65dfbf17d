"""Decoding with contexts: the same loops write what the main decoder would behind embeddings put there by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.contexts import SLOT, encode_with_slot, memory_of
from models.decoder import Decoder
from models.errors import InputError
from models.weights.byte_tokenizer import byte_tokenizer
from tests.conftest import tiny_config
from tests.support.decode_reference import texts
from tests.support.dolphin_pair import CONTEXTS, MEMORY, small_pair

ROOM = 6
PROMPTS = [[5, SLOT, 9, 11, 3], [7], [2, 44, SLOT, 31]]


@pytest.fixture(scope="module")
def pair():
    return small_pair()


@pytest.fixture(scope="module")
def greedy(pair):
    return make_decode_fn(pair[0], "greedy", max_new_tokens=ROOM)


@pytest.fixture(scope="module")
def expected(pair) -> list[list[int]]:
    """Greedy texts of the main decoder, run whole for every token on embeddings that are concatenated by hand."""
    model, params = pair
    main = params["main"]
    memory, width = np.asarray(memory_of(model, params, CONTEXTS)), 16
    bound = model.writer.bind({"params": main})
    run = jax.jit(lambda x: bound.unembed(bound.layers(x, jnp.arange(width, dtype=jnp.int32)[None])[0]))
    table, rows = np.asarray(main["embedding"]["embedding"]).T, []
    for prompt, values in zip(PROMPTS, memory, strict=True):
        slot = prompt.index(SLOT) if SLOT in prompt else 0
        before, after = prompt[:slot], [token for token in prompt[slot:] if token != SLOT]
        row: list[int] = []
        for _ in range(ROOM):
            x = np.concatenate([table[before], values, table[after + row]])
            logits = np.asarray(run(jnp.asarray(np.pad(x, ((0, width - len(x)), (0, 0))))[None]))[0, len(x) - 1]
            assert np.diff(np.sort(logits)[-2:])[0] > 1e-4, "too close to call"
            row.append(int(logits.argmax()))
        rows.append(row)
    return rows


def test_greedy_text_is_that_behind_embeddings_put_there_by_hand(pair, greedy, expected):
    params = pair[1]
    assert len({token for row in expected for token in row}) > 4
    assert texts(greedy(params, PROMPTS, contexts=CONTEXTS)) == expected
    assert texts(greedy(params, PROMPTS[1:], contexts=CONTEXTS[1:])) == expected[1:], "whatever shares the batch"
    assert texts(greedy(params, PROMPTS[:1], contexts=CONTEXTS[1:2])) != expected[:1], "contexts matter"


def test_memory_that_was_made_once_serves_many_calls(pair, greedy, expected):
    memory = memory_of(*pair, CONTEXTS)
    assert memory.shape == (3, MEMORY, 32)
    assert texts(greedy(pair[1], PROMPTS, contexts=memory)) == expected


@pytest.mark.parametrize("method", ["sample", "prompt_lookup"])
def test_other_methods_write_the_same(pair, expected, method):
    decode_fn = make_decode_fn(pair[0], method, max_new_tokens=ROOM)
    own = {"temperature": 0.0} if method == "sample" else {}
    assert texts(decode_fn(pair[1], PROMPTS, contexts=CONTEXTS, **own)) == expected


def test_a_drafts_model_reads_prompts_of_its_own(pair, expected):
    model, params = pair
    decode_fn = make_decode_fn(model, "speculative_sampling", max_new_tokens=ROOM, draft=model.writer)
    both = WithDraft(params, params["main"])
    with pytest.raises(InputError, match="drafting needs a plain decoder, and this is a pair"):
        make_decode_fn(model.writer, "speculative_sampling", max_new_tokens=ROOM, draft=model)
    with pytest.raises(InputError, match="give it whole texts, draft_prompts"):
        decode_fn(both, PROMPTS, contexts=CONTEXTS)
    assert texts(decode_fn(both, PROMPTS, contexts=CONTEXTS, draft_prompts=[[1, 2], [3], [4]])) == expected


def test_the_context_itself_as_embeddings_is_the_context(pair):
    """With nothing compressed, a text is what it is behind the tokens themselves."""
    main = pair[1]["main"]
    decode_fn = make_decode_fn(pair[0].writer, "greedy", max_new_tokens=ROOM)
    context, prompt = [8, 30, 31, 2, 19], [6, 6, 23]
    whole = texts(decode_fn(main, [[5, *context, *prompt]]))
    values = jnp.asarray(np.asarray(main["embedding"]["embedding"]).T[context][None])
    assert texts(decode_fn(main, [[5, SLOT, *prompt]], contexts=values)) == whole
    assert texts(decode_fn(main, [[5, *prompt]])) != whole


def test_the_penalty_knows_nothing_of_places_of_memory(pair):
    """Token 0, which fills them, is not taken for one that the prompt has."""
    sample = make_decode_fn(pair[0], "sample", max_new_tokens=1)
    inputs = sample.inputs(PROMPTS, contexts=CONTEXTS)
    seen = sample.start(pair[1], *inputs).carry.seen
    assert not seen[:, 0].any() and seen.sum(axis=1).tolist() == [4, 1, 3]


@pytest.mark.parametrize(
    ("prompts", "contexts", "words"),
    [
        ([[5]], CONTEXTS, "contexts must be as many as the 1 prompts, one for each; got 3"),
        ([[5, SLOT]], CONTEXTS[:1], "must hold one context and go on behind it"),
        ([[SLOT, SLOT, 5]], CONTEXTS[:1], "2 of its ids are -1"),
        ([[5]], [[]], "contexts, read as the compressor's: prompt 0 is empty"),
        ([[5]], [[97]], "token id 97, but the model has ids 0 to 96"),
        ([[5]], [[1] * 62], "the longest context has 62 tokens, the compressor reads 61 and its 3 memory tokens"),
        ([[5]], jnp.zeros((1, 3, 31)), r"must be floats \[prompts, embeddings, 32\]"),
        ([[5, SLOT, 6]], None, "prompt 0 has token id -1"),
        ([5], CONTEXTS[:1], "prompt 0 must be a list of token ids, got 5"),
    ],
)
def test_what_cannot_be_is_refused(greedy, prompts, contexts, words):
    with pytest.raises(InputError, match=words):
        greedy.inputs(prompts, contexts=contexts)


def test_the_longest_context_is_read_and_plain_models_have_no_compressor(pair, greedy):
    assert greedy(pair[1], [[5]], contexts=[[1] * 61], max_new_tokens=1).lengths.tolist() == [1]
    plain = make_decode_fn(Decoder(tiny_config()), "greedy", max_new_tokens=2)
    with pytest.raises(InputError, match="this model has no compressor"):
        plain.inputs([[5]], contexts=[[1]])


def test_text_is_encoded_around_the_slot():
    tokenizer = byte_tokenizer()
    assert encode_with_slot(tokenizer, "ab<context>c", "<context>") == [
        *tokenizer.encode("ab"),
        SLOT,
        *tokenizer.encode("c"),
    ]
    assert encode_with_slot(tokenizer, "ab", "<context>") == [SLOT, *tokenizer.encode("ab")]
