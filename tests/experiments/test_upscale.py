"""Growing a checkpoint: which layers, what the folder computes, training on, what does not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train, training, upscale
from experiments.config import load_config
from experiments.train_config import TrainConfig
from models.errors import InputError
from models.growth import layer_cosines, most_alike
from models.weights.load import load_model
from tests.support.tiny_folder import write_tiny_folder

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 250, (2, 7)), jnp.int32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def grow(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    return lambda *more: upscale.main(["--model", str(tiny), "--out", str(tmp_path / "out"), *more]), tmp_path / "out"


def logits(folder):
    model, params, _ = load_model(folder)
    return np.asarray(model.apply({"params": params}, TOKENS).logits)


def test_named_layers_that_begin_as_nothing(grow, tiny, capsys):
    run, out = grow
    run("--growth.double", "1", "2", "--growth.identity", "--growth.max_length", "256")
    assert "layers: 0 1 1\n2 layers became 3, 128 tokens of context 256" in capsys.readouterr().out
    model, _, tokenizer = load_model(out)
    assert (model.config.num_layers, model.config.max_length) == (3, 256) and tokenizer is not None
    np.testing.assert_array_equal(logits(out), logits(tiny))
    with pytest.raises(InputError, match="exists already"):
        run("--layers", "3")


def test_layers_are_chosen_by_their_cosines(grow, tiny, capsys):
    run, out = grow
    run("--layers", "3", "--data.size", "50")
    printed = capsys.readouterr().out
    cosines = [float(line.split()[-1]) for line in printed.splitlines() if "cosine" in line]
    model, params, _ = load_model(tiny)
    assert len(cosines) == 2 and cosines[0] != cosines[1]
    chosen = most_alike(jnp.asarray(cosines), 1)[0]
    assert f"layers: {' '.join(map(str, [*range(chosen + 1), *range(chosen, 2)]))}\n" in printed
    roughly = layer_cosines(model, params, TOKENS)
    np.testing.assert_allclose(cosines, roughly, atol=0.2)
    assert not np.allclose(logits(out), logits(tiny))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "5"], "layers must be 3 to 4"),
        (["--layers", "2"], "layers must be 3 to 4"),
        (["--growth.double", "1", "3"], "does not fit a model of 2 layers"),
        (["--growth.max_length", "64"], "less than the model's context"),
        ([], "nothing is to grow"),
        (["--layers", "3", "--growth.double", "0", "1"], "not both"),
    ],
)
def test_what_does_not_fit(grow, flags, message, capsys):
    run, out = grow
    with pytest.raises((InputError, SystemExit)) as error:
        run(*flags)
    assert message in str(error.value) + capsys.readouterr().err
    assert not out.exists()


TRAIN = """
adapter: null
growth: {double: [0, 1], rope_theta: 1.0e+6, max_length: 160}
data: {type: generated, tasks: [larger], size: 40, test_size: 0}
batch_size: 2
length: 144
evaluation: {every: 0, batches: 0, examples: 0}
"""


def test_a_grown_model_is_trained_and_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    (tmp_path / "train.yaml").write_text(TRAIN)

    def config(*more):
        argv = [
            "--config",
            str(tmp_path / "train.yaml"),
            "--model",
            str(tiny),
            "--run_dir",
            str(tmp_path / "run"),
            *more,
        ]
        return load_config(TrainConfig, argv, prog="test", description="")

    training.run_training(config("--steps", "1"))
    training.run_training(config("--steps", "2"))
    model = load_model(tmp_path / "run" / "model").model
    assert model.config.num_layers == 3 and model.config.max_length == 160
    assert {block.attention.rope.theta for block in model.config.blocks} == {1e6}
    with pytest.raises(InputError, match="started with another growth"):
        training.run_training(config("--steps", "3", "--growth.rope_theta", "2e6"))
    assert "layers_2" in train.describe(config()) or "3" in train.describe(config())


def test_growth_is_of_trained_models_that_are_trained_whole(tiny):
    for more in (["--scratch.layers", "1"], ["--adapter.type", "lora"]):
        with pytest.raises((InputError, SystemExit)):
            load_config(
                TrainConfig,
                ["--model", str(tiny), "--growth.max_length", "512", *more],
                prog="test",
                description="",
            )
