"""Decoding of encoder-decoders: the same loops write what the whole model would, from prompts that are read once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import METHODS, make_decode_fn
from models.decoder import Decoder
from models.encoder_decoder import network
from models.errors import InputError
from models.families import family_of
from tests.conftest import tiny_config
from tests.support.decode_reference import texts
from tests.support.tiny_models import ENCODER_DECODERS

ROOM = 8
PROMPTS = [[5, 9, 11, 3, 60], [7], [2, 44, 31, 8, 8, 19, 23, 50, 6, 12, 40]]


@pytest.fixture(scope="module")
def net():
    """(model, params) whose greedy text is varied."""
    model = network(family_of(ENCODER_DECODERS["t5_gated"]).read_config(ENCODER_DECODERS["t5_gated"]))
    source = (jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32))
    params = jax.jit(lambda key: model.init(key, source[0], source=source))(jax.random.key(0))["params"]
    return model, jax.tree.map(lambda x: x * 10.0 if x.ndim == 2 else x, params)


@pytest.fixture(scope="module")
def expected(net) -> list[list[int]]:
    """Greedy texts, the whole model run on every row alone for every token; the prompts are not padded to a bucket."""
    model, params = net
    run = jax.jit(lambda written, source: model.apply({"params": params}, written, source=source).logits)
    rows = []
    for prompt in PROMPTS:
        source = (jnp.asarray([prompt]), jnp.asarray([len(prompt)], jnp.int32))
        row = [0]
        for _ in range(ROOM):
            written = np.zeros((1, ROOM + 1), np.int32)
            written[0, : len(row)] = row
            scores = np.sort(logits := np.asarray(run(written, source))[0, len(row) - 1])
            assert scores[-1] - scores[-2] > 1e-4, "too close to call"
            row.append(int(logits.argmax()))
        rows.append(row[1:])
    return rows


@pytest.fixture(scope="module")
def greedy(net):
    return make_decode_fn(net[0], "greedy", max_new_tokens=ROOM)


def test_greedy_text_is_that_of_the_whole_model(net, greedy, expected):
    assert len({token for row in expected for token in row}) > 6
    assert texts(greedy(net[1], PROMPTS)) == expected
    assert texts(greedy(net[1], PROMPTS[2:])) == expected[2:], "a row does not depend on its batch"
    assert texts(greedy(net[1], PROMPTS, max_new_tokens=[3, 0, 8])) == [expected[0][:3], [], expected[2]]


def test_sampling_at_temperature_zero_is_greedy_and_rows_have_texts_of_their_own(net, expected):
    sample = make_decode_fn(net[0], "sample", max_new_tokens=ROOM)
    assert texts(sample(net[1], PROMPTS, temperature=0.0)) == expected
    together = texts(sample(net[1], PROMPTS, [3, 4, 5]))
    assert together != expected
    assert texts(sample(net[1], PROMPTS[:1], [3])) == together[:1]


def test_the_penalty_knows_what_was_written_not_what_was_read(net, expected):
    sample = make_decode_fn(net[0], "sample", max_new_tokens=ROOM)
    reads = [prompt + [expected[row][0]] for row, prompt in enumerate(PROMPTS)]
    first = [text[:1] for text in texts(sample(net[1], reads, temperature=0.0))]
    cold = {"temperature": 0.0, "repetition_penalty": 100.0}
    assert [text[:1] for text in texts(sample(net[1], reads, **cold))] == first


def whole_scores(net, prompt, tokens):
    """f64[N]: log p of each text, i32[N, T], by whole passes of the model, the start token in front."""
    model, params = net
    written = np.pad(np.asarray(tokens, np.int32), ((0, 0), (1, 0)))
    source = jnp.asarray([prompt] * len(written)), jnp.full((len(written),), len(prompt), jnp.int32)
    logits = model.apply({"params": params}, jnp.asarray(written), source=source).logits
    law = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)[:, :-1]
    return np.take_along_axis(law, written[:, 1:, None], axis=2)[..., 0].sum(axis=1)


def test_beams_as_many_as_tokens_find_the_likeliest_of_all_pairs(net):
    beam = make_decode_fn(net[0], "beam", max_new_tokens=2, width=61, num_return=3, length_penalty=0.0)
    found = beam(net[1], PROMPTS).found
    pairs = np.array(np.meshgrid(np.arange(61), np.arange(61), indexing="ij")).reshape(2, -1).T
    for row, prompt in enumerate(PROMPTS):
        scores = whole_scores(net, prompt, pairs)
        best = np.argsort(-scores)[:3]
        np.testing.assert_array_equal(found.tokens[row], pairs[best])
        np.testing.assert_allclose(found.scores[row], scores[best], atol=1e-3)


def test_groups_of_beams_and_one_beam(net, expected):
    one = make_decode_fn(net[0], "beam", max_new_tokens=ROOM, width=1)
    assert texts(one(net[1], PROMPTS)) == expected
    options = {"width": 4, "groups": 4, "num_return": 4, "length_penalty": 0.0}
    for term in ("hamming", "embedding"):
        diverse = make_decode_fn(net[0], "diverse_beam", max_new_tokens=ROOM, term=term, strength=50.0, **options)
        found = diverse(net[1], PROMPTS).found
        for row, prompt in enumerate(PROMPTS):
            rows = np.asarray(found.tokens[row])
            assert expected[row] in rows.tolist(), "the first group is greedy"
            np.testing.assert_allclose(found.scores[row], whole_scores(net, prompt, rows), atol=1e-2)
            if term == "hamming":
                assert all(len(set(column)) == 4 for column in rows.T.tolist()), "groups choose apart at every place"


def test_the_cache_has_no_room_for_what_is_read(net, greedy):
    state = greedy.start(net[1], *greedy.inputs(PROMPTS))
    assert state.cache.num_slots == ROOM + 1 and (state.cache.length == 0).all()
    assert state.cache.encoded.k[0].shape == (3, 4, 16, 12) and state.cache.encoded.length.tolist() == [5, 1, 11]
    short = make_decode_fn(net[0], "greedy", max_new_tokens=ROOM, cache_slots=3)
    assert short(net[1], PROMPTS).lengths.tolist() == [3, 3, 3]


def test_a_prompt_longer_than_the_encoder_reads_is_refused(net, greedy):
    with pytest.raises(InputError, match="the longest prompt has 513 tokens, the encoder reads 512 at most"):
        greedy(net[1], [[1] * 513])
    assert greedy(net[1], [[1] * 512], max_new_tokens=1).lengths.tolist() == [1]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.encoders])
def test_methods_for_decoders_alone_refuse_it(net, name):
    with pytest.raises(InputError, match=f"method '{name}' needs a decoder-only model, and this t5 model"):
        make_decode_fn(net[0], name)


def test_so_do_drafts(net):
    with pytest.raises(InputError, match="drafting needs a decoder-only model"):
        make_decode_fn(Decoder(tiny_config()), "speculative_sampling", draft=net[0])
