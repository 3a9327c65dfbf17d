"""Training a pair of decoders: what moves, contexts in the compressor's tokens, files, a whole run."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax.traverse_util import flatten_dict

from experiments.decode import Runner
from experiments.decode_config import DecodeConfig
from experiments.train import describe
from experiments.train_config import TrainConfig
from experiments.train_dolphin import FILE, DolphinTraining
from experiments.training import run_training
from finetune.adapters import LoraConfig, make_adapter
from finetune.adapters.adapter import select
from finetune.adapters.saved import base_of
from finetune.data import read_data
from finetune.data_configs import FactsData
from finetune.facts import fact_example, fact_examples
from finetune.objectives import cross_entropy
from finetune.optimizers import OptimizerConfig, learning_rate, make_optimizer
from finetune.packing import Batches
from finetune.rows import Compressed
from finetune.saved_dolphin import Bases, load_dolphin, save_dolphin
from finetune.state import Constants, adapter_tuning, new_state, with_whole
from finetune.trainer import make_train_step
from models.dolphin import PARTS, Dolphin, DolphinConfig, with_memory
from models.errors import InputError
from models.weights.byte_tokenizer import byte_tokenizer
from models.weights.load import load_model
from tests.support.tiny_folder import write_tiny_folder

MEMORY = 3
DATA = FactsData(stage="instruction", size=8, test_size=4, facts=1)


def backward_tokenizer():
    """Bytes with other ids than those of `byte_tokenizer`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return dataclasses.replace(byte_tokenizer(), backend=backend, eos_id=None, stop_ids=())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return write_tiny_folder(folder / "small", seed=2), write_tiny_folder(folder / "main", seed=3)


@pytest.fixture(scope="module")
def pair(folders):
    """(model, params, bases, the two decoders as `load_dolphin` takes them)."""
    (small, small_params, _), (main, main_params, _) = (load_model(str(folder)) for folder in folders)
    model = Dolphin(DolphinConfig(small.config, main.config, MEMORY))
    params = with_memory(model, jax.random.key(0), small_params, main_params)
    bases = Bases(base_of("small", small_params), base_of("main", main_params))
    return model, params, bases, (small, small_params), (main, main_params)


@pytest.fixture(scope="module")
def data():
    return read_data(DATA, byte_tokenizer(), 64, Compressed(backward_tokenizer(), MEMORY, 80))


def test_a_row_has_places_for_its_context_which_is_in_the_compressors_tokens(data):
    item = fact_examples("instruction", 8, 1, 0, False)[0]
    main, reader = byte_tokenizer(), backward_tokenizer()
    row, source = (np.split(values, starts[1:-1])[0] for values, starts in (
        (data.train.tokens, data.train.starts), (data.train.sources, data.train.source_starts)))  # fmt: skip
    assert row.tolist() == [-1] * MEMORY + main.encode(item.prompt + item.completion) + [main.eos_id]
    assert source.tolist() == reader.encode(item.context) != main.encode(item.context)
    targets = np.split(data.train.targets, data.train.starts[1:-1])[0]
    assert targets.sum() == len(main.encode(item.completion)) + 1 and targets[-1]
    question = data.questions[0]
    assert question.tokens == [-1, *main.encode(question.example.prompt)]
    assert reader.decode(question.context) == question.example.context


@pytest.fixture(scope="module", params=["memory and projector", "compressor too"])
def trained(request, pair, data):
    """(what is adapted, parameters before, state, parameters behind one update)."""
    model, params = pair[:2]
    targets = ("compressor/layers_*",) if request.param == "compressor too" else ()
    adapter = make_adapter(LoraConfig(rank=2, targets=targets))
    frozen, values = adapter.init(jax.random.key(1), select(params, targets), None)
    values = jax.tree.map(lambda x: x + 0.01, values)
    method = with_whole(adapter_tuning(adapter), PARTS)
    trainable = {"adapter": values, "whole": {name: params[name] for name in PARTS}}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup=0.0), 1, method)
    step = make_train_step(model, cross_entropy(), method, optimizer, learning_rate(OptimizerConfig(), 1))
    batch = Batches(data.train, batch_size=8, length=64, packing=False)(0)
    before = jax.device_get((params, trainable))
    state = new_state(jax.tree.map(jnp.copy, trainable), optimizer)
    state, figures = step(state, Constants(params, frozen, None), jax.tree.map(jnp.asarray, batch))
    assert np.isfinite(figures["loss"]) and figures["grad_norm"] > 0
    return request.param, before, jax.device_get(state.trainable), method.merge(params, frozen, state.trainable), params


def test_gradients_reach_what_is_trained_and_nothing_else_moves(trained):
    what, (before, first), now, merged, params = trained
    for path, value in flatten_dict(now, sep="/").items():
        assert np.abs(value - flatten_dict(first, sep="/")[path]).max() > 0, path
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), before)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(merged["main"]), before["main"])
    same = jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(merged["compressor"]), before["compressor"]))
    assert all(same) == (what == "memory and projector")


def test_padding_and_what_shares_a_batch_change_no_loss(pair, data):
    from finetune.trainer import summed_loss

    model, params = pair[:2]
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), Batches(data.train, batch_size=2, length=64, packing=False)(0))
    loss = jax.jit(lambda batch: summed_loss(model, cross_entropy(), params, None, batch)[0])
    alone = [jax.tree.map(lambda x, row=row: x[row : row + 1], batch) for row in range(2)]
    np.testing.assert_allclose(loss(batch), sum(loss(one) for one in alone), rtol=1e-5)
    behind = jnp.arange(batch.source.tokens.shape[1])[None, :] >= batch.source.lengths[:, None]
    other = batch.source._replace(tokens=jnp.where(behind, 9, batch.source.tokens))
    np.testing.assert_allclose(loss(batch.replace(source=other)), loss(batch), rtol=1e-6)
    changed = batch.source._replace(tokens=batch.source.tokens + 1)
    assert abs(float(loss(batch.replace(source=changed)) - loss(batch))) > 1e-4


def test_a_file_gives_the_pair_back_and_refuses_other_decoders(pair, tmp_path):
    model, params, bases, small, main = pair
    adapter, path = make_adapter(LoraConfig(rank=2)), tmp_path / FILE
    frozen, values = adapter.init(jax.random.key(1), select(params, ("q",)), None)
    values = jax.tree.map(lambda x: x + 0.1, values)
    save_dolphin(path, params, bases, LoraConfig(rank=2), frozen, values)
    again, found = load_dolphin(path, bases, small, main)
    assert again == model
    wanted = adapter_tuning(adapter).merge(params, frozen, values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
    save_dolphin(tmp_path / "whole", wanted, bases, None)
    jax.tree.map(np.testing.assert_array_equal, load_dolphin(tmp_path / "whole", bases, small, main)[1], wanted)
    for part in ("compressor", "main"):
        other = bases._replace(**{part: bases.main if part == "compressor" else bases.compressor})
        with pytest.raises(InputError, match=f"belongs to the {part} '"):
            load_dolphin(path, other, small, main)
    with pytest.raises(InputError, match="no such head"):
        load_dolphin(tmp_path / "none", bases, small, main)


def test_contexts_of_facts_answer_what_is_asked():
    for stage in ("restoration", "continual", "instruction"):
        train, test = (fact_examples(stage, 30, 3, 0, test) for test in (False, True))
        assert not {one.context for one in train} & {one.context for one in test}
        assert train == fact_examples(stage, 30, 3, 0, False)
    assert all(one.completion in one.context for one in train)
    assert fact_example(random.Random(1), "restoration", 2).completion.count("years old") == 2
    with pytest.raises(InputError, match="facts must be 1 to 24"):
        fact_example(random.Random(0), "restoration", 25)


def test_a_run_of_two_stages_and_decoding_with_what_came_of_it(folders, tmp_path):
    small, main = folders
    stage = TrainConfig(
        model=str(main), dolphin=DolphinTraining(str(small), MEMORY), adapter=LoraConfig(rank=2), data=DATA, steps=2,
        batch_size=4, length=64, source_length=80, packing=False, run_dir=tmp_path / "one",
    )  # fmt: skip
    stage = dataclasses.replace(stage, evaluation=dataclasses.replace(stage.evaluation, examples=2, max_new_tokens=4))
    first = run_training(stage)
    assert {"eval/loss", "eval/exact_match"} <= set(first)
    assert f"trained {first['size/trainable']:,.0f} " in describe(stage)
    start = dataclasses.replace(stage.dolphin, start=tmp_path / "one" / FILE)
    second = run_training(dataclasses.replace(stage, dolphin=start, run_dir=tmp_path / "two", steps=1))
    assert np.isfinite(second["eval/loss"])
    config = DecodeConfig(
        model=str(main), dolphin=tmp_path / "two" / FILE, compressor=str(small), prompt=("What?", "Who?"),
        contexts=("Mira is a baker.",), batch_size=2, max_new_tokens=4,
    )  # fmt: skip
    records = Runner(config).decode(config.prompt, [0, 0])
    assert len(records) == 2 and all(0 < len(record.token_ids) <= 4 for record in records)
    with pytest.raises(InputError, match="belongs to the compressor"):
        Runner(dataclasses.replace(config, compressor=str(main)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": TrainConfig().data}, "learns from examples about contexts: take data of type facts"),
        ({"dolphin": None, "source_length": None}, "train a model with a compressor"),
        ({"source_length": 126}, "more than the compressor reads, 125"),
    ],
)
def test_runs_that_cannot_be(folders, tmp_path, changes, words):
    small, main = folders
    config = TrainConfig(
        model=str(main), dolphin=DolphinTraining(str(small), MEMORY), data=DATA, packing=False, source_length=80,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(InputError, match=words):
        run_training(dataclasses.replace(config, **changes))
