"""Models with an encoder in training: the loss against a slow loop, padding, gradients, pairs and their teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr

from finetune.corpus import Example
from finetune.data import read_data
from finetune.data_configs import GeneratedData, StoriesData
from finetune.distillation import DistillationConfig, distillation, joined
from finetune.objectives import cross_entropy
from finetune.packing import Batches
from finetune.reading import read_batch
from finetune.rows import Pairs, Row, encode, fit, pair, stack
from finetune.state import Source
from finetune.trainer import summed_loss
from models.encoder_decoder import init_params, network
from models.errors import InputError
from models.families import family_of
from models.scratch import ScratchConfig, scratch_model
from models.weights.byte_tokenizer import byte_tokenizer
from tests.support.tiny_models import ENCODER_DECODERS
from tests.support.toy_training import toy_batch, toy_model, toy_params

SHAPE = ScratchConfig(2, 32, 4, 2, mlp_width=48, max_length=64, encoder_layers=3)
MODELS = {
    "rotary": scratch_model(SHAPE, 61),
    "t5": network(family_of(ENCODER_DECODERS["t5_gated"]).read_config(ENCODER_DECODERS["t5_gated"])),
}
ROWS = [  # sources of 5, 1 and 9 tokens, answers of 3, 4 and 1
    Row([0, 7, 8, 9], [False, True, True, True], [3, 4, 5, 6, 7]),
    Row([0, 9, 9, 1, 2], [False, True, True, True, True], [11]),
    Row([0, 50], [False, True], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
]
PAIRS = Pairs(start_token=0, source_length=48)
TOKENIZER = byte_tokenizer()


def batch_of(rows=ROWS):
    """One micro-batch, rows in some order; the last one is empty."""
    batches = Batches(stack(rows), batch_size=len(rows) + 1, length=16, packing=False)
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batches(0))


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """(model, parameters far from flat laws, jitted (params, batch) -> (loss, gradient), jitted logits of one row)."""
    model = MODELS[request.param]
    params = jax.tree.map(lambda x: x * 8.0 if x.ndim == 2 else x, init_params(model, jax.random.key(0)))

    def loss(params, batch):
        return summed_loss(model, cross_entropy(), params, None, batch, chunk=7)

    one = jax.jit(lambda params, tokens, source: model.apply({"params": params}, tokens, source=source).logits[0])
    return model, params, jax.jit(jax.value_and_grad(loss, has_aux=True)), one


def laws(made, row):
    """Log-probabilities f64[T, V] of what follows each token of one row, read alone and without padding inside."""
    source = np.zeros((1, 16), np.int32)
    source[0, : len(row.source)] = row.source
    tokens = np.zeros((1, 8), np.int32)
    tokens[0, : len(row.tokens)] = row.tokens
    logits = made[3](made[1], tokens, (source, np.array([len(row.source)], np.int32)))
    return log_softmax(np.asarray(logits, np.float64), axis=-1)[: len(row.tokens)]


def test_the_loss_of_ragged_pairs_against_a_slow_loop(made):
    expected = -sum(laws(made, row)[t - 1, row.tokens[t]] for row in ROWS for t in range(1, len(row.tokens)))
    (found, figures), _ = made[2](made[1], batch_of())
    assert figures["tokens"] == 8
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_stands_behind_a_source_changes_nothing_and_the_encoder_learns(made):
    batch = batch_of()
    (value, _), gradient = made[2](made[1], batch)
    tokens, lengths = batch.source
    noise = jnp.where(jnp.arange(tokens.shape[1])[None, :] < lengths[:, None], tokens, 29)
    assert (noise != tokens).any()
    (other, _), other_gradient = made[2](made[1], batch.replace(source=Source(noise, lengths)))
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other_gradient, gradient)
    for part in ("layers_0", "layers_1"):
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["encoder"][part]))
    read = tokens.at[jnp.argmax(lengths), 2].add(1)  # and what is read does count
    assert abs(made[2](made[1], batch.replace(source=Source(read, lengths)))[0][0] - value) > 1e-4


def test_sources_and_models_that_do_not_belong_together():
    with pytest.raises(InputError, match="the batch has sources, and this llama model has no encoder"):
        read_batch(toy_model(), toy_params(), batch_of())
    with pytest.raises(InputError, match="is an encoder-decoder .t5. and the batch has no source"):
        read_batch(MODELS["t5"], {}, jax.tree.map(lambda x: x[0], toy_batch()))


def test_a_pair_has_the_tokens_of_the_row():
    row = encode(TOKENIZER, Example("reverse ab\n", "ba"))
    tokens, targets, source = pair(row, 0)
    assert [*source, *tokens[1:]] == row.tokens and tokens[0] == 0
    assert TOKENIZER.decode(source) == "reverse ab\n" and targets == [False, True, True, True]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    talk = pair(encode(TOKENIZER, turns), 0)
    assert TOKENIZER.decode(talk.source, skip_special=False) == "<user>a<|im_end|><assistant>b<|im_end|><user>c" + (
        "<|im_end|><assistant>"
    )
    assert TOKENIZER.decode(talk.tokens[1:], skip_special=False) == "d<|im_end|>"


def test_data_for_a_model_with_an_encoder():
    config = GeneratedData(tasks=("reverse", "add"), size=40, test_size=10)
    data, plain = read_data(config, TOKENIZER, 24, PAIRS), read_data(config, TOKENIZER, 64)
    assert [question.tokens for question in data.questions] == [question.tokens for question in plain.questions]
    assert len(data.train) == 40 and (data.train.source_lengths > 5).all() and (plain.train.source_lengths == 0).all()
    with pytest.raises(InputError, match="a story: a model with an encoder learns to answer what it reads"):
        read_data(StoriesData(size=2, test_size=0, words=8), TOKENIZER, 64, PAIRS)
    _, notes = fit(ROWS, 16, cut=False, source_length=5)
    assert notes == ["1 of 3 texts left out: what is read is longer than source_length, 5 tokens (the longest has 9)"]


def test_batches_of_pairs_have_every_row_once_and_come_again():
    rng = np.random.default_rng(0)
    rows = [Row([0, r], [False, True], rng.integers(1, 60, rng.integers(1, 40)).tolist()) for r in range(1, 30)]
    options = {"batch_size": 4, "length": 16, "packing": False, "seed": 3}
    whole = Batches(stack(rows), **options)
    found, shapes = [], set()
    for step in range(len(whole)):
        batch = whole(step)
        shapes.add(batch.source.tokens.shape[2])
        for tokens, source, length in zip(batch.tokens[0], *(x[0] for x in batch.source), strict=True):
            assert not source[length:].any()
            found += [(int(tokens[1]), source[:length].tolist())] if tokens[1] else []
    assert sorted(found) == [(row.tokens[1], row.source) for row in rows] and len(shapes) == 3
    parts = [Batches(stack(rows), **options, process_index=index, process_count=2) for index in range(2)]
    for step in (len(whole) + 2, 1):
        both = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *(part(step) for part in parts))
        jax.tree.map(np.testing.assert_array_equal, both, whole(step))
    other = [*rows[:-1], rows[-1]._replace(source=[1])]
    assert Batches(stack(other), **options).fingerprint != whole.fingerprint
    with pytest.raises(InputError, match="cannot share a packed row: set packing to false"):
        Batches(stack(rows), batch_size=4, length=16)


def test_a_teacher_without_an_encoder_reads_source_and_answer_behind_each_other():
    batch = batch_of()
    whole, places = jax.tree.map(np.asarray, joined(batch))
    for row in ROWS:
        (at,) = np.flatnonzero((np.asarray(batch.tokens)[:, : len(row.tokens)] == row.tokens).all(1))
        text = [*row.source, *row.tokens[1:]]
        assert whole.tokens[at, : len(text)].tolist() == text and not whole.tokens[at, len(text) :].any()
        assert whole.segments[at].tolist() == [1] * len(text) + [0] * (whole.tokens.shape[1] - len(text))
        for t, token in enumerate(row.tokens[1:]):  # the teacher's row that predicts the same token
            assert whole.tokens[at, places[at, t] + 1] == token
        assert whole.targets[at].sum() == len(row.tokens) - 1
        np.testing.assert_array_equal(whole.positions[at, : len(text)], np.arange(len(text)))


def test_distillation_from_a_teacher_without_an_encoder(made):
    """KL by hand, token by token; from a model to itself there is none."""
    objective = distillation(DistillationConfig("teacher"), toy_model(), toy_params(), 58)
    read = jax.jit(lambda tokens: toy_model().apply({"params": toy_params()}, tokens).logits[0])
    expected = 0.0
    for row in ROWS:
        text = np.zeros((1, 16), np.int32)
        text[0, : len(row.source) + len(row.tokens) - 1] = [*row.source, *row.tokens[1:]]
        taught = np.asarray(read(text), np.float64)
        for t in range(len(row.tokens) - 1):
            p = np.exp(log_softmax(taught[len(row.source) - 1 + t, :58]))
            own = laws(made, row)[t, :58]
            expected += rel_entr(p, np.exp(log_softmax(own))).sum()
    model, params = made[:2]
    found, _ = jax.jit(lambda batch: summed_loss(model, objective, params, objective.constants, batch))(batch_of())
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    itself = distillation(DistillationConfig("teacher"), model, params, 58)
    none, _ = jax.jit(lambda batch: summed_loss(model, itself, params, itself.constants, batch))(batch_of())
    assert abs(none) < 1e-3 < expected


def test_scratch_models_with_an_encoder():
    config = MODELS["rotary"].config
    assert (config.encoder.num_layers, config.decoder.num_layers) == (3, 2)
    assert all(block.cross.rope is None for block in config.decoder.blocks)
    with pytest.raises(InputError, match="encoder_layers must not be negative"):
        dataclasses.replace(SHAPE, encoder_layers=-1)


def test_a_student_learns_on_samples_of_its_own(made):
    """Rows twice, the second time with what the student writes; KL on these, cross-entropy on the data's own."""
    model, params = made[:2]
    settings = DistillationConfig("teacher", label_share=0.25, on_samples=True)
    objective = distillation(settings, toy_model(), toy_params(), 58, model, (5,))
    plain = distillation(DistillationConfig("teacher"), toy_model(), toy_params(), 58)
    batch = batch_of()

    @jax.jit
    def both(params, batch):
        rows = objective.training_rows(params, batch)
        value = summed_loss(model, objective, params, objective.constants, rows)[0]
        half = jax.tree.map(lambda x: x[len(ROWS) + 1 :], rows)
        return rows, value, summed_loss(model, plain, params, plain.constants, half)[0]

    rows, value, divergence = both(params, batch)
    own, written = (jax.tree.map(lambda x, at=at: np.asarray(x)[at], rows) for at in (slice(0, 4), slice(4, 8)))
    jax.tree.map(np.testing.assert_array_equal, own, jax.tree.map(np.asarray, batch))
    empty = ~np.asarray(batch.segments).any(1)
    assert empty.sum() == 1 and not written.segments[empty].any() and not written.targets[empty].any()
    for tokens, segments, targets in zip(
        *(x[~empty] for x in (written.tokens, written.segments, written.targets)), strict=True
    ):
        count = (segments > 0).sum()
        assert tokens[0] == 0 and targets.sum() == count - 1 and (segments[:count] == segments[0]).all()
        ends = np.flatnonzero(tokens[1:count] == 5)
        assert ends.tolist() == [count - 2] if count < len(tokens) else (ends == count - 2).all()
    likelihood = made[2](params, batch)[0][0]
    np.testing.assert_allclose(value, 2 * (0.25 * likelihood + 0.75 * divergence), rtol=1e-4)
    again = both(params, batch)[0]
    jax.tree.map(np.testing.assert_array_equal, again, rows)
    other = both(jax.tree.map(lambda x: x * 0.5, params), batch)[0]
    assert (np.asarray(other.tokens) != np.asarray(rows.tokens)).any()


def test_samples_are_for_students_with_an_encoder():
    settings = DistillationConfig("teacher", on_samples=True)
    with pytest.raises(InputError, match="on_samples needs a student with an encoder"):
        distillation(settings, toy_model(), toy_params(), 58, toy_model())
