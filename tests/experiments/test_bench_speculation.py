"""The benchmark of speculation on a tiny model: its last line, its page, and figures that can be checked."""

import json

import numpy as np

from experiments import bench_speculation
from models import load_model
from tests.support.decode_reference import forward
from tests.support.tiny_folder import write_tiny_folder


def test_last_line_and_page(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    model = write_tiny_folder(tmp_path / "tiny", max_length=1024)
    questions = tmp_path / "questions.jsonl"
    lines = [{"question_id": i, "category": "qa", "turns": ["ab" * (i + 2)]} for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model", str(model), "--questions", str(questions), "--out", str(tmp_path / "out")]
    flags += ["--batch", "2", "--width", "3", "--max_new_tokens", "8", "--repeats", "1"]
    bench_speculation.main(flags)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["verify_cost"]["1"] == 1 and set(figures["verify_cost"]) == {"1", "4", "8", "16"}
    products = {rows: figures["bandwidth"][rows] * cost for rows, cost in figures["verify_cost"].items()}
    assert all(abs(product / products["1"] - 1) < 1e-6 for product in products.values()), "the same weights each time"
    assert figures["overhead"] < 1 and figures["batched"] > 0
    assert set(figures["log_prob"]) == {"sample", "token_recycling", "rsd_c"}
    for found in figures["log_prob"].values():
        assert abs(found["standard_errors"]) < 5 and found["mean"] < 0 < found["variance"]
    page = (tmp_path / "out" / "table.md").read_text()
    assert f"{figures['batched']:.2f} times" in page and "| 1.00 |" in page


def test_log_probabilities_are_those_of_whole_forward_passes(tmp_path):
    model, params, _ = load_model(str(write_tiny_folder(tmp_path / "tiny")))
    prompts, tokens = [[5, 9, 11], [7]], np.array([[3, 4], [250, 6]], np.int32)
    found = bench_speculation._mean_log_probs(model, params, prompts, tokens)
    for prompt, row, mean in zip(prompts, tokens.tolist(), found, strict=True):
        logits = np.asarray(forward(model, params, np.array([prompt + row], np.int32)), np.float64)[0]
        law = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        places = range(len(prompt) - 1, len(prompt) + len(row) - 1)
        np.testing.assert_allclose(mean, np.mean([law[p, t] for p, t in zip(places, row, strict=True)]), atol=1e-4)
