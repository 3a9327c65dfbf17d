"""CodeT5+'s losses against their formulas, what they may not see, and a run that is stopped and goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from finetune.checkpoints import Checkpoints
from finetune.code_losses import contrastive_loss, draw_negatives, matching_loss, writing_loss, wrong_pairs
from finetune.code_tokenizer import code_tokenizer
from finetune.codet5plus import LOSSES, CodeT5PlusConfig, codet5plus, prepare_batch
from finetune.denoising import restore, special_tokens, word_table
from finetune.momentum import Vectors, empty_queue, enqueue, follow
from finetune.objectives import BatchObjective
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.state import Constants, full_tuning, new_state, part_tuning
from finetune.trainer import make_train_step, train
from models.encoder_decoder import EncoderDecoder, init_params
from models.errors import InputError
from models.joined import JoinConfig, Part, join, trained_apart
from models.weights.byte_tokenizer import byte_tokenizer
from tests.support.code_training import READ, ROWS, WIDE, pair_batch, tiny_bimodal
from tests.support.toy_training import toy_model

CONFIG = CodeT5PlusConfig(losses=tuple(LOSSES), queue=2 * ROWS, momentum=0.9)
LENGTHS = (READ, WIDE)
FEWER = dataclasses.replace(CONFIG, losses=("denoise", "contrastive", "match"))
SPECIALS = special_tokens(code_tokenizer(), ("cls", "clm", "match", "code", "text", "end", "sentinels"))


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(tiny_bimodal(), key))(jax.random.key(0))


def rows(seed: int, count: int = ROWS, width: int = 5) -> Vectors:
    rng = np.random.default_rng(seed)
    texts, codes = (rng.standard_normal((count, width)).astype(np.float32) for _ in range(2))
    unit = [jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (texts, codes)]
    return Vectors(*unit, jnp.asarray(rng.integers(0, 10**6, (count, 2)), jnp.int32), jnp.ones(count, bool))


def test_the_queue_gives_up_the_oldest_first_and_keeps_its_shape():
    queue, batches = empty_queue(3 * ROWS, 5), [rows(seed) for seed in range(5)]
    add = jax.jit(enqueue)
    for count, batch in enumerate(batches, 1):
        queue = add(queue, batch)
        assert queue.texts.shape == (3 * ROWS, 5) and int(queue.added) == count * ROWS
        assert int(queue.filled.sum()) == min(count, 3) * ROWS
    for name in ("texts", "codes", "keys"):
        expected = np.concatenate([getattr(batches[i], name) for i in (3, 4, 2)])
        np.testing.assert_array_equal(getattr(queue, name), expected)


def test_what_is_queued_has_no_gradient():
    def kept(texts):
        return jnp.sum(enqueue(empty_queue(ROWS, 5), rows(0).replace(texts=texts)).texts)

    np.testing.assert_array_equal(jax.grad(kept)(rows(0).texts), 0.0)


def test_the_slow_copy_follows():
    slow, fast = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, -2.0])}
    np.testing.assert_allclose(follow(slow, fast, 0.75)["a"], [1.5, 1.0])
    np.testing.assert_array_equal(follow(slow, fast, 1.0)["a"], slow["a"])
    np.testing.assert_array_equal(follow(slow, fast, 0.0)["a"], fast["a"])


def test_the_contrastive_loss_is_its_formula_and_goes_into_the_trained_encoder_alone():
    mine, slow, older = rows(0), rows(1), rows(2)
    queue = enqueue(empty_queue(2 * ROWS, 5), older)

    def loss(texts, codes, slow, queue):
        return contrastive_loss(texts, codes, slow, queue, 0.1)["contrastive"]

    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(mine.texts, mine.codes, slow, queue)
    sides = []
    for own, answers in ((mine.texts, "codes"), (mine.codes, "texts")):
        scores = np.asarray(own) @ np.concatenate([getattr(slow, answers), getattr(older, answers)]).T / 0.1
        sides.append(np.mean(np.log(np.exp(scores).sum(-1)) - scores[np.arange(ROWS), np.arange(ROWS)]))
    assert float(value) == pytest.approx(np.mean(sides), rel=1e-5)
    assert all(np.abs(grad).min(axis=-1).max() > 0 for grad in grads)
    into_slow = jax.grad(lambda texts: loss(mine.texts, mine.codes, slow.replace(texts=texts), queue))(slow.texts)
    into_queue = jax.grad(lambda codes: loss(mine.texts, mine.codes, slow, queue.replace(codes=codes)))(queue.codes)
    assert not np.any(into_slow) and not np.any(into_queue)


def test_equal_pairs_and_empty_rows_are_no_answers():
    mine, slow, older = rows(0, 1), rows(1, 1), rows(2, 1)
    for keys, counts in (([7, 8], True), ([3, 8], False), ([7, 4], False)):
        queue = enqueue(empty_queue(1, 5), older.replace(keys=jnp.array([keys], jnp.int32)))
        now = slow.replace(keys=jnp.array([[3, 4]], jnp.int32))
        found = contrastive_loss(mine.texts, mine.codes, now, queue, 0.1)["contrastive"]
        assert (float(found) > 1e-6) == counts
    mine, slow = rows(0), rows(1)
    less = jnp.arange(ROWS) < ROWS - 1
    cut = contrastive_loss(mine.texts, mine.codes, slow.replace(valid=less), empty_queue(ROWS, 5), 0.1)
    few = jax.tree.map(lambda x: x[: ROWS - 1], (mine, slow))
    expected = contrastive_loss(few[0].texts, few[0].codes, few[1], empty_queue(ROWS, 5), 0.1)
    np.testing.assert_allclose(cut["contrastive"], expected["contrastive"], rtol=1e-6)


def test_wrong_pairs_are_never_right_ones():
    """Neither the row's own, nor one with the same text or the same function, nor an empty row."""
    keys = jnp.array([[1, 1], [2, 1], [3, 3], [3, 4], [5, 5], [0, 0]], jnp.int32)
    batch = rows(0, 6).replace(keys=keys, valid=jnp.arange(6) < 5)
    likeness = 50.0 * jnp.eye(6, dtype=jnp.float32)
    draw = jax.jit(jax.vmap(lambda key: wrong_pairs(likeness, batch, key)))
    found = jax.device_get(draw(jax.random.split(jax.random.key(0), 200)))
    wanted = {0: {2, 3, 4}, 1: {2, 3, 4}, 2: {0, 1, 4}, 3: {0, 1, 4}, 4: {0, 1, 2, 3}}
    for row, others in wanted.items():
        assert set(found.code[:, row]) == set(found.text[:, row]) == others
    assert found.some_code[:, :5].all() and not found.some_code[:, 5].any()
    alone = wrong_pairs(likeness, batch.replace(valid=jnp.arange(6) < 2), jax.random.key(0))
    assert not alone.some_code.any() and not alone.some_text.any()


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (0.0, False)], ids=["by likeness", "planted: all alike"])
def test_wrong_answers_are_drawn_by_their_likeness(scale, fits):
    likeness = jnp.array([[0.0, 1.0, 2.0, 3.0, 9.0]])
    allowed = jnp.array([[True, True, True, True, False]])
    draws = jax.vmap(lambda key: draw_negatives(scale * likeness, allowed, key)[0])
    found = np.bincount(np.ravel(jax.jit(draws)(jax.random.split(jax.random.key(1), 4000))), minlength=5)
    law = np.exp(np.arange(4.0)) / np.exp(np.arange(4.0)).sum()
    chi = np.sum((found[:4] - 4000 * law) ** 2 / (4000 * law))
    assert found[4] == 0 and (chi < 16.3) == fits  # 0.1 percent of the law's own draws lie above


def test_a_head_that_cannot_tell_has_a_loss_of_ln_2(params):
    model, batch = tiny_bimodal(), prepared()
    blind = {**params, "matching": jax.tree.map(jnp.zeros_like, params["matching"])}
    new = rows(0).replace(keys=batch.keys)
    wrong = wrong_pairs(jnp.zeros((ROWS, ROWS)), new, jax.random.key(0))
    read = model.apply({"params": params}, *batch.text, method="output")
    found = matching_loss(model, blind, read, batch.text.lengths, batch.code, new, wrong)
    assert float(found["match"]) == pytest.approx(np.log(2), rel=1e-6)


def prepared(seed: int = 0, config: CodeT5PlusConfig = CONFIG, updates: int = 0, empty: int = 0):
    batch = prepare_batch(
        config, SPECIALS, word_table(code_tokenizer()), pair_batch(seed, empty=empty), updates, LENGTHS
    )
    return jax.tree.map(lambda value: jnp.asarray(value[0]), batch)


def test_what_the_losses_read():
    batch, again, later = prepared(empty=1), prepared(empty=1), prepared(empty=1, updates=1)
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    for loss, changes in (("denoise", True), ("suffix", True), ("complete", False), ("text_to_code", False)):
        assert (np.asarray(batch.split[loss][0].tokens) != later.split[loss][0].tokens).any() == changes
    for row in range(ROWS - 1):
        text, code = (side.tokens[row][: side.lengths[row]].tolist() for side in (batch.text, batch.code))
        pair = {name: [x.tokens[row][: x.lengths[row]].tolist() for x in sides] for name, sides in batch.split.items()}
        assert restore(type("S", (), dict(source=pair["denoise"][0], target=pair["denoise"][1])), SPECIALS) == code[:-1]
        assert pair["suffix"][0][0] == SPECIALS.clm and pair["suffix"][0][1:] + pair["suffix"][1] == code
        assert pair["complete"] == [[SPECIALS.clm], code]
        assert pair["text_to_code"] == [text, code] and pair["code_to_text"] == [code[:-1], [*text, SPECIALS.end]]
    assert all(sides[1].lengths[-1] == 0 for sides in batch.split.values())
    assert len(np.unique(batch.keys[:, 0])) == len(np.unique(batch.keys[:, 1])) == ROWS


def test_the_loss_of_writing_is_the_cross_entropy_behind_the_start(params):
    model, batch = tiny_bimodal(), prepared(empty=1)
    source, target = batch.split["text_to_code"]
    found = jax.jit(lambda p: writing_loss(model, p, source, target, SPECIALS.code))(params)
    total = count = 0
    before = jnp.pad(target.tokens, ((0, 0), (1, 0)), constant_values=SPECIALS.code)[:, :-1]
    laws = jax.nn.log_softmax(model.apply({"params": params}, before, source=source._replace(
        lengths=jnp.maximum(source.lengths, 1))).logits)  # fmt: skip
    for row, length in enumerate(target.lengths.tolist()):
        total -= float(jnp.sum(jnp.take_along_axis(laws[row, :length], target.tokens[row, :length, None], -1)))
        count += length
    assert float(found) == pytest.approx(total / count, rel=1e-5)


class Run:
    """Updates of three losses on batches of pairs."""

    def __init__(self, params, method=None, constants=None):
        self.objective = codet5plus(FEWER, tiny_bimodal(), code_tokenizer(), LENGTHS)
        settings = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0)
        method = method or full_tuning(jax.tree.map(lambda x: x.dtype, params))
        self.optimizer = make_optimizer(settings, 4, method)
        self.step = make_train_step(tiny_bimodal(), self.objective, method, self.optimizer, learning_rate(settings, 4))
        self.constants = constants or Constants({}, {}, None)
        self.figures = {}

    def start(self, params):
        with jax.numpy_dtype_promotion("standard"):
            state = new_state(jax.tree.map(jnp.copy, params), self.optimizer, self.objective.start(params))
        return jax.device_put(state, jax.devices()[0])  # as one that was read from a file

    def batches(self, updates):
        return self.objective.prepare(pair_batch(updates), updates)

    def go(self, state, steps):
        return train(self.step, state, self.constants, self.batches, steps, self.figures.__setitem__)


@pytest.fixture(scope="module")
def straight(params):
    run = Run(params)
    return run, jax.device_get(run.go(run.start(params), 4))


def test_a_run_that_is_stopped_goes_on_bit_for_bit(params, straight, tmp_path):
    run, expected = straight
    state = run.go(run.start(params), 2)
    with Checkpoints(tmp_path) as kept:
        kept.save(state, {}, {})
    with Checkpoints(tmp_path) as kept:
        state, _, _ = kept.restore(run.start(params), {})
    jax.tree.map(np.testing.assert_array_equal, run.go(state, 4), expected)


def test_an_update_moves_all_that_it_should(params, straight):
    run, state = straight
    assert set(run.figures[1]) == {*FEWER.losses, "recall", "matched", "loss", "tokens", "grad_norm", "learning_rate"}
    assert run.figures[1]["loss"] == pytest.approx(sum(run.figures[1][name] for name in FEWER.losses), rel=1e-5)
    assert run.figures[4]["loss"] < run.figures[1]["loss"]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, state.trainable)
    assert all(jax.tree.leaves(moved))
    assert int(state.own.queue.added) == 4 * ROWS and state.own.queue.filled.all() and int(state.own.updates) == 4
    assert set(state.own.slow["decoder"]) == {"embedding"} and "matching" not in state.own.slow


def test_the_slow_encoder_is_what_follows_by_the_formula(params, straight):
    run, _ = straight
    state = run.go(run.start(params), 1)
    slow = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, params["projection"], state.trainable["projection"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.own.slow["projection"], slow)


def test_a_frozen_decoder_is_the_same_after_training(params):
    """The joined model learns to write; every number of the decoder that it was made of stays."""
    whole = tiny_bimodal()
    plain = dataclasses.replace(whole.config.encoder)
    own = {
        **{k: v for k, v in params["decoder"].items() if "layers" not in k},
        "layers_0": params["encoder"]["layers_0"],
    }
    part = Part(plain, jax.tree.map(jnp.copy, own))
    model, start = join(part, Part(plain, own), JoinConfig("x", start_token=0), jax.random.key(1))
    base, trained = trained_apart(start)
    method = part_tuning(jax.tree.map(lambda x: x.dtype, trained))
    objective = codet5plus(dataclasses.replace(CONFIG, losses=("text_to_code",)), model, code_tokenizer(), LENGTHS)
    assert objective.start(start) == {}
    settings = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0.0)
    optimizer = make_optimizer(settings, 3, method)
    step = make_train_step(model, objective, method, optimizer, learning_rate(settings, 3))
    state = new_state(jax.tree.map(jnp.copy, trained), optimizer)
    constants, figures = Constants(base, {}, None), {}
    state = train(step, state, constants, lambda n: objective.prepare(pair_batch(0), n), 3, figures.__setitem__)
    after = flatten_dict(method.merge(constants.base, {}, state.trainable), sep="/")
    assert set(after) == set(flatten_dict(start, sep="/")) and figures[3]["loss"] < figures[1]["loss"]
    for path, value in flatten_dict(own, sep="/").items():
        np.testing.assert_array_equal(after[f"decoder/{path}"], value)
    assert float(after["decoder/layers_0/cross_gate"]) != 0


def test_what_does_not_fit_is_said(params):
    model, tokenizer = tiny_bimodal(), code_tokenizer()

    def changed(**settings):
        return EncoderDecoder(dataclasses.replace(model.config, **settings))

    assert isinstance(codet5plus(CONFIG, model, tokenizer, LENGTHS), BatchObjective)
    with pytest.raises(InputError, match="trains a model with an encoder and a decoder"):
        codet5plus(CONFIG, toy_model(), tokenizer, LENGTHS)
    with pytest.raises(InputError, match="trains a model with an encoder and a decoder"):
        bare = dataclasses.replace(model.config.decoder, blocks=())
        codet5plus(CONFIG, changed(decoder=bare, matching=False), tokenizer, LENGTHS)
    with pytest.raises(InputError, match="contrastive needs a model that gives vectors"):
        codet5plus(CONFIG, changed(embedding_width=None), tokenizer, LENGTHS)
    with pytest.raises(InputError, match="match needs a model with a head"):
        codet5plus(CONFIG, changed(matching=False), tokenizer, LENGTHS)
    with pytest.raises(InputError, match=r"the tokenizer has no .*<extra_id_0>"):
        codet5plus(CONFIG, model, byte_tokenizer(), LENGTHS)
    with pytest.raises(InputError, match="unknown loss of codet5plus 'matching'. Did you mean 'match'"):
        CodeT5PlusConfig(losses=("matching",))
    with pytest.raises(InputError, match="must name at least one, each once"):
        CodeT5PlusConfig(losses=("match", "match"))
    with pytest.raises(InputError, match="momentum must be 0 to 1"):
        CodeT5PlusConfig(momentum=1.5)
    with pytest.raises(InputError, match="a queue of 10 is not a multiple of the batch of 4 rows: take 8"):
        enqueue(empty_queue(10, 5), rows(0))
    batch = pair_batch(0)
    with pytest.raises(InputError, match="needs pairs of a text and its code"):
        prepare_batch(CONFIG, SPECIALS, None, batch._replace(source=None), 0, LENGTHS)
    with pytest.raises(InputError, match="set accumulate to 1, not 2"):
        prepare_batch(CONFIG, SPECIALS, None, batch._replace(tokens=np.zeros((2, 2, 9), np.int32)), 0, LENGTHS)
    with pytest.raises(InputError, match="no end of text behind its code"):
        cut = np.where(batch.tokens == SPECIALS.end, 0, batch.tokens)
        prepare_batch(CONFIG, SPECIALS, None, batch._replace(tokens=cut), 0, LENGTHS)
