"""Training of heads: what is guessed from where, the loss, hidden states in files, accept lengths, files of heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import WithDraft, make_decode_fn
from decoding.speculative.chimera import ChimeraConfig
from decoding.speculative.clover import CloverConfig
from decoding.speculative.draft_head import Reading
from decoding.speculative.eagle import EagleConfig
from decoding.speculative.head_kinds import kind_of
from decoding.speculative.head_trees import one_tree
from decoding.speculative.hidden_transfer import HiddenTransferConfig
from decoding.speculative.medusa import MEDUSA_HEAD, MedusaConfig
from decoding.speculative.ppd import PPDConfig
from finetune.adapters.saved import Base, base_of
from finetune.draft_heads import (
    HeadBatch,
    HeadLoss,
    at_random_places,
    filled,
    head_loss,
    index_rows,
    make_head_step,
    make_ranks,
    make_trainer,
    offsets_ahead,
)
from finetune.head_figures import accept_length, accuracy_of, all_ranks, figures_of
from finetune.hidden_store import open_streams, store, stored
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.packing import Batches
from finetune.rows import Row, stack
from finetune.saved_heads import SavedHead, load_draft_head, save_draft_head
from finetune.state import full_tuning, new_state
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, greedy_texts

CONFIG = MedusaConfig(offsets=2)
LAST = 3  # the stream behind the last layer


@pytest.fixture(scope="module")
def rows(tiny):
    """Eight prompts with the model's greedy text behind them."""
    found = greedy_texts(*tiny, PROMPTS, ROOM)
    return stack([Row(p + t, [False] * len(p) + [True] * len(t)) for p, t in zip(PROMPTS, found, strict=True)])


@pytest.fixture(scope="module")
def folder(tiny, rows, tmp_path_factory):
    """The streams over them, in files."""
    folder = tmp_path_factory.mktemp("streams") / "hidden"
    store(folder, *tiny, base_of("tiny", tiny[1]), rows, "texts", (1, LAST), batch_size=4)
    return folder


@pytest.fixture(scope="module")
def hidden(tiny, folder):
    return open_streams(folder, base_of("tiny", tiny[1]), "texts", (LAST,))


@pytest.fixture(scope="module")
def batch(rows, hidden) -> HeadBatch:
    """All texts, packed into rows of 64."""
    batches = Batches(index_rows(rows, np.arange(8)), batch_size=5, length=64)
    assert len(batches) == 1
    return filled(batches(0), rows, hidden)


def random_values(tiny, config=CONFIG):
    return scattered(MEDUSA_HEAD.init(config, *tiny, jax.random.key(2)), 0.05)


def scattered(values, scale):
    return jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.key(x.size), x.shape), values)


def trainer_of(tiny, rows, config=CONFIG, **loss):
    return make_trainer(MEDUSA_HEAD, config, *tiny, HeadLoss(**loss), rows.tokens)


def test_streams_are_those_of_the_model(tiny, rows, folder, hidden):
    model, params = tiny
    for row in (0, 2, 5):
        own = slice(rows.starts[row], rows.starts[row + 1])
        output = model.apply({"params": params}, jnp.asarray(rows.tokens[None, own]), collect=(LAST,))
        np.testing.assert_allclose(hidden[LAST][own], output.hidden[LAST][0], rtol=2e-3, atol=2e-2)
    assert stored(folder, base_of("tiny", params), "texts") == (1, LAST)
    assert stored(folder / "none", base_of("tiny", params), "texts") == ()


def test_files_of_hidden_states_that_do_not_fit_are_refused(tiny, rows, folder, tmp_path):
    base = base_of("tiny", tiny[1])
    for arguments, words in (
        ((folder, Base("other", "f" * 64), "texts", (LAST,)), "are those of 'tiny' .*, not of 'other'"),
        ((folder, base, "changed", (LAST,)), "are of other texts"),
        ((folder, base, "texts", (2,)), r"before layers \[1, 3\], not before 2: .* --layers 1 2 3"),
        ((tmp_path, base, "texts", (LAST,)), "holds no hidden states"),
    ):
        with pytest.raises(InputError, match=words):
            open_streams(*arguments)
    with pytest.raises(InputError, match="the model has streams 0 to 3, not 4"):
        store(tmp_path / "new", *tiny, base, rows, "texts", (4,))
    assert not (tmp_path / "new").exists()
    whole = (folder / "1.npy").read_bytes()
    (folder / "1.npy").write_bytes(whole[:-7])
    with pytest.raises(InputError, match="missing, cut short or damaged"):
        open_streams(folder, base, "texts", (1,))
    (folder / "1.npy").write_bytes(whole)


def test_what_is_guessed_from_where(rows, batch):
    labels, wanted = map(np.asarray, offsets_ahead(batch, 2))
    tokens, segments, targets = batch.reading.tokens, batch.reading.segments, batch.targets
    length = tokens.shape[1]
    for row, place in np.ndindex(*tokens.shape):
        for offset in range(2):
            then = place + 2 + offset
            right = then < length and segments[row, place] > 0
            right = right and len(set(segments[row, place : then + 1])) == 1
            right = right and targets[row, place + 1] and targets[row, then]
            assert wanted[row, place, offset] == right
            assert not right or labels[row, place, offset] == tokens[row, then]
    assert wanted[..., 0].sum() == 8 * (ROOM - 1), "from the prompts' last tokens on"


@pytest.mark.parametrize("vocabulary", ["seen", "all"])
def test_the_loss_is_the_mean_cross_entropy_of_its_formula(tiny, rows, batch, vocabulary):
    model, params = tiny
    values = random_values(tiny)
    trainer, constants = trainer_of(tiny, rows, vocabulary=vocabulary, decay=0.5, hard=2.0, soft=0.7, feature=0.3)
    value, figures = head_loss(trainer, constants, values, batch)
    ids = np.unique(rows.tokens) if vocabulary == "seen" else np.arange(61)
    assert vocabulary == "all" or len(ids) < 61
    reading = batch.reading._replace(hidden=jax.tree.map(lambda x: x.astype(np.float32), batch.reading.hidden))
    y = MEDUSA_HEAD.guesses(CONFIG, model, params, values, reading)
    f = model.apply({"params": params}, reading.hidden[LAST], method="normed")
    labels, wanted = map(np.asarray, offsets_ahead(batch, 2))
    total, hard = 0.0, [0.0, 0.0]
    scale = np.abs(np.stack([f[r, p + 1 + k] for r, p, k in zip(*np.nonzero(wanted), strict=True)])).mean()
    for row, place, offset in zip(*np.nonzero(wanted), strict=True):
        guess, truth = y[row, place, offset], f[row, place + 1 + offset]
        logits, law = (np.asarray(model.apply({"params": params}, x, method="scores"))[ids] for x in (guess, truth))
        log_p = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        own = -log_p[np.flatnonzero(ids == labels[row, place, offset])[0]]
        law = np.exp(law - law.max()) / np.exp(law - law.max()).sum()
        gap = np.abs(guess - truth)
        near = np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
        total += 0.5**offset * (2.0 * own - 0.7 * (law * log_p).sum() + 0.3 * near / scale)
        hard[offset] += own
    count = wanted.sum(axis=(0, 1))
    # The scale is taken over the places of each chunk.
    np.testing.assert_allclose(float(value), total / count[0], rtol=5e-3)
    for offset in range(2):
        np.testing.assert_allclose(
            float(figures[f"cross_entropy_{offset + 1}"]), hard[offset] / count[offset], rtol=1e-4
        )


def test_places_are_drawn_among_those_that_every_offset_is_guessed_from(batch):
    wanted = np.asarray(offsets_ahead(batch, 2)[1]).all(axis=-1)
    draws = [at_random_places(batch, 2, 7, (0, step)).reading.places for step in range(60)]
    np.testing.assert_array_equal(draws[3], at_random_places(batch, 2, 7, (0, 3)).reading.places)
    for places in draws:
        for own, row in zip(places, wanted, strict=True):
            real = own[own >= 0]
            assert len(set(real.tolist())) == len(real) == min(7, row.sum()) and row[real].all()
    assert {*np.flatnonzero(wanted[0])} == {*np.concatenate([places[0] for places in draws])} - {-1}


def test_the_loss_over_places_is_the_mean_over_them(tiny, rows, batch):
    model, params = tiny
    values, (trainer, constants) = random_values(tiny), trainer_of(tiny, rows, soft=0.5)
    some, every = (at_random_places(batch, 2, count, (0, 3)) for count in (7, 64))
    whole, part, found = (head_loss(trainer, constants, values, b)[1] for b in (batch, every, some))
    places = some.reading.places
    tokens = [int(figures["tokens"]) for figures in (whole, part, found)]
    assert tokens == [8 * (ROOM - 1), 8 * (ROOM - 2), (places >= 0).sum()]
    np.testing.assert_allclose(whole["cross_entropy_2"], part["cross_entropy_2"], rtol=1e-5)
    ids, labels = np.unique(rows.tokens), np.asarray(offsets_ahead(batch, 2)[0])
    reading = batch.reading._replace(hidden=jax.tree.map(lambda x: x.astype(np.float32), batch.reading.hidden))
    y = MEDUSA_HEAD.guesses(CONFIG, model, params, values, reading)
    log_p = jax.nn.log_softmax(model.apply({"params": params}, y, method="scores")[..., ids], axis=-1)
    own = [
        -log_p[r, p, 0, np.searchsorted(ids, labels[r, p, 0])] for r, row in enumerate(places) for p in row if p >= 0
    ]
    np.testing.assert_allclose(found["cross_entropy_1"], np.mean(own), rtol=1e-4)


def test_updates_learn_and_leave_the_target_alone(tiny, rows, batch):
    trainer, constants = trainer_of(tiny, rows)
    before = jax.tree.map(np.array, constants.params)
    settings = OptimizerConfig(learning_rate=1e-2, warmup=0.0)
    optimizer = make_optimizer(settings, 30, full_tuning(None))
    step = make_head_step(trainer, optimizer, learning_rate(settings, 30))
    with jax.numpy_dtype_promotion("standard"):
        state = new_state(MEDUSA_HEAD.init(CONFIG, *tiny, jax.random.key(0)), optimizer)
    losses = []
    for _ in range(30):
        state, metrics = step(state, constants, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0] and int(state.step) == 30 and float(metrics["grad_norm"]) > 0
    jax.tree.map(np.testing.assert_array_equal, before, constants.params)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (EagleConfig(offsets=3), {}),
        (ChimeraConfig(offsets=3), {}),
        (CloverConfig(), {"tree": "static"}),
        (CloverConfig(version=2), {"tree": "static"}),
        (HiddenTransferConfig(layers=(1,)), {}),
        (PPDConfig(), {}),
        (PPDConfig(offsets=2, copies=2), {}),
    ],
    ids=["eagle", "chimera", "clover", "clover_2", "hidden_transfer", "ppd", "ppd_copies"],
)
def test_decoding_accepts_what_training_simulates(tiny, rows, folder, config, options):
    """The head's guesses in training are those in decoding: one step is as long as the other, in every text."""
    model, params = tiny
    kind = kind_of(config)
    hidden = open_streams(folder, base_of("tiny", params), "texts", kind.streams(config, model))
    trainer, _ = make_trainer(kind, config, model, params, HeadLoss(), rows.tokens)
    values, chosen = scattered(kind.init(config, model, params, jax.random.key(2)), 0.1), np.arange(8)
    ranks = all_ranks(make_ranks(trainer), params, values, rows, hidden, chosen, 64)
    accuracy = accuracy_of(ranks)
    simulated = accept_length(kind.trees(config, accuracy, 12), ranks, rows, chosen)
    fn = make_decode_fn(model, config.type, max_new_tokens=ROOM, head=config, accuracy=accuracy, nodes=12, **options)
    # Whether the first step is a plain one, for want of streams.
    plain = config.type in ("hidden_transfer", "ppd")
    prompts = [rows.tokens[rows.starts[r] : rows.starts[r + 1] - ROOM + (not plain)].tolist() for r in chosen]
    stats = jax.tree.map(np.asarray, fn(WithDraft(params, values), prompts, max_new_tokens=ROOM - (not plain)).stats)
    assert stats.accepted.sum() > 10
    assert simulated == pytest.approx((stats.emitted - plain).sum() / (stats.steps - plain).sum())


def test_simulated_accept_lengths_are_those_of_decoding(tiny, rows, hidden):
    model, params = tiny
    trainer, _ = trainer_of(tiny, rows)
    values, chosen = random_values(tiny), np.arange(8)
    ranks = all_ranks(make_ranks(trainer), params, values, rows, hidden, chosen, 48)
    assert ((ranks >= 0).sum(axis=0) == [8 * (ROOM - 1), 8 * (ROOM - 2)]).all() and ranks.max() < 61
    accuracy = accuracy_of(ranks)
    for nodes in (2, 12):
        fn = make_decode_fn(model, "medusa", max_new_tokens=ROOM, head=CONFIG, accuracy=accuracy, nodes=nodes)
        stats = fn(WithDraft(params, values), PROMPTS).stats
        simulated = accept_length(one_tree(CONFIG, accuracy, nodes), ranks, rows, chosen)
        steps = np.asarray(stats.steps) - 1
        assert simulated == pytest.approx((np.asarray(stats.emitted) - 1).sum() / steps.sum())
    found, figures = figures_of(ranks, ranks, rows, (chosen, chosen), functools.partial(one_tree, CONFIG))
    assert found == accuracy and figures["top1_2"] == pytest.approx(np.mean(ranks[ranks[:, 1] >= 0, 1] == 0))
    assert figures["mat_chain"] >= 1 and figures["mat_4"] <= figures["mat_16"] <= figures["mat_63"]
    assert figures["top10_1"] == pytest.approx(np.mean(ranks[ranks[:, 0] >= 0, 0] < 10))
    with pytest.raises(InputError, match="no text to calibrate on has 3 tokens"):
        accuracy_of(np.where(np.arange(2)[None, :] == 1, -1, ranks))


@pytest.mark.parametrize("config", [CONFIG, PPDConfig(offsets=2, copies=3)], ids=lambda config: config.type)
def test_files_of_heads(tiny, tmp_path, config):
    base, path = base_of("tiny", tiny[1]), tmp_path / "run" / "head.safetensors"
    accuracy = ((0.5,) * 10, (0.25,) * 10)
    values = kind_of(config).init(config, *tiny, jax.random.key(2))
    save_draft_head(path, SavedHead(config, values, accuracy, {"mat_16": 1.5}, base))
    found = load_draft_head(path, base, config.type)
    assert (found.config, found.accuracy, found.figures, found.base) == (config, accuracy, {"mat_16": 1.5}, base)
    jax.tree.map(np.testing.assert_array_equal, found.values, values)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(InputError, match="belongs to 'tiny' .*, not to 'other'"):
        load_draft_head(path, Base("other", "0" * 64))
    with pytest.raises(
        InputError, match=f"holds a head of '{config.type}', not of 'eagle': use --method {config.type}"
    ):
        load_draft_head(path, base, "eagle")
    with pytest.raises(InputError, match="no such head: .*; train one with python -m experiments.train_draft_head"):
        load_draft_head(tmp_path / "none", base)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_draft_head(path, base)


def test_settings_out_of_range():
    for settings, words in (
        ({"decay": 0.0}, "decay must be above 0"),
        ({"hard": 0.0}, "not all 0"),
        ({"places": 0}, "places must"),
    ):
        with pytest.raises(InputError, match=words):
            HeadLoss(**settings)
    assert dataclasses.is_dataclass(HeadLoss()) and issubclass(Reading, tuple)
