"""The benchmark of CoreInfer on a tiny model: its last line, its page, and figures that can be checked."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from decoding.method import with_kernels
from experiments import bench
from experiments.bench_core_infer import CHOICES, CoreInferBenchConfig, bench_core_infer
from experiments.neuron_costs import Costs, LargestInputs
from models import load_model
from models.errors import InputError
from tests.support.decode_reference import forward
from tests.support.tiny_folder import write_tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture()
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": i, "category": "qa", "turns": ["ab" * (i + 2)]} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_last_line_and_page(monkeypatch, capsys, tmp_path, folder, questions):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    flags = ["--type", "core_infer", "--model", str(folder), "--questions", str(questions), "--prompts", "2"]
    flags += ["--betas", "0.5", "1.0", "--timed_beta", "0.5", "--max_new_tokens", "5", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags, "--out", str(tmp_path / "out")])
    bench.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    whole, cost = figures["cost"]["whole"], figures["cost"]
    assert figures["mlp"] > 0 and figures["step"] > 0 and figures["texts"] == 2 and figures["layers"] == [0, 1]
    assert whole[1] == 1.0, "a greedy text is what the model itself would write"
    for choose in CHOICES:
        np.testing.assert_allclose(cost[choose]["1.0"], whole, rtol=1e-5)
        assert abs(cost[choose]["0.5"][0] - whole[0]) > 1e-6
    page = (tmp_path / "out" / "table.md").read_text()
    assert "| neurons | 50% | 100% |" in page and page.count("\n| ") == len(CHOICES) + 2


def test_scores_are_those_of_whole_forward_passes(folder):
    model, params, _ = load_model(str(folder))
    costs = Costs(model, params, 0.4, 6)
    prompt, text = [5, 9, 11, 7], [3, 4, 250]
    cache, votes = costs.read(prompt)
    losses, same = costs.score(None, cache, prompt, text)
    logits = np.asarray(forward(model, params, np.array([prompt + text], np.int32)), np.float64)[0, 3:6]
    law = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(losses, -law[np.arange(3), text], atol=1e-4)
    np.testing.assert_array_equal(same, logits.argmax(axis=1) == text)
    for choose in ("core", "random", "oracle"):
        kernels = costs.kernels(choose, 0.5, votes)
        assert np.abs(costs.score(kernels, cache, prompt, text)[0] - losses).max() > 1e-6
    assert with_kernels(params, kernels)["layers_0"]["mlp"]["up"] is params["layers_0"]["mlp"]["up"]


def test_the_oracle_keeps_the_largest_inputs_of_each_token():
    x, w = (jnp.asarray(np.random.default_rng(i).normal(size=s), jnp.float32) for i, s in ((0, (2, 3, 8)), (1, (8, 5))))
    kept = np.zeros((2, 3, 8), np.float32)
    for place in np.ndindex(2, 3):
        best = np.argsort(-np.abs(np.asarray(x[place])))[:3]
        kept[place][best] = np.asarray(x[place])[best]
    kernel = LargestInputs(w, 3)
    assert kernel.shape == (8, 5) and kernel.materialize() is w
    np.testing.assert_allclose(kernel.dot(x), kept @ np.asarray(w), atol=1e-5)


def test_wrong_settings_are_refused(folder, questions):
    with pytest.raises(ValueError, match="prompts, max_new_tokens and repeats must be at least 1"):
        CoreInferBenchConfig(prompts=0)
    with pytest.raises(InputError, match="leave questions that choose the static neurons"):
        bench_core_infer(CoreInferBenchConfig(model=str(folder), questions=questions, prompts=3))
