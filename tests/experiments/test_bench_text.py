"""Perplexity of a long text on a tiny model: figures that can be checked, and what is refused."""

import json
import sys

import numpy as np
import pytest

from experiments import bench
from experiments.bench_text import LongTextConfig, TextRow, policy_of, token_losses
from models import load_model
from models.errors import InputError
from tests.support.decode_reference import forward
from tests.support.tiny_folder import write_tiny_folder

TABLE = """
type: long_text
prompt: 20
lengths: [32, 48]
rows:
  - {name: dense}
  - {name: near, method: streaming, options: {sink: 2, local: 6}}
  - {name: wide, method: streaming, options: {sink: 24, local: 24}}
  - {name: chosen, method: tidal, options: {budget: 48}}
  - {name: paged, method: lserve, options: {budget: 48, page: 8, logical: 4, gates: 1, streaming: 0.0}}
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    model = write_tiny_folder(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("All work and no play makes a dull text. Who would read on?\n")
    (tmp_path / "table.yaml").write_text(TABLE)
    flags = ["--config", str(tmp_path / "table.yaml"), "--model", str(model), "--texts", str(tmp_path / "text.txt")]

    def call(*more: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["bench", *flags, "--out", str(tmp_path / "out"), *more])
        bench.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_last_line_and_page(run, tmp_path):
    figures = run()
    model, params, tokenizer = load_model(str(tmp_path / "tiny"))
    tokens = np.asarray(tokenizer.encode((tmp_path / "text.txt").read_text())[:48])
    losses = _dense_losses(model, params, tokens)
    wanted = [np.exp(losses[20 - 1 : 32 - 1].mean()), np.exp(losses[32 - 1 :].mean())]
    for name in ("dense", "wide", "chosen", "paged"):
        np.testing.assert_allclose(figures[name]["perplexity"], wanted, rtol=1e-4, err_msg=f"{name} sees everything")
    assert np.abs(np.subtract(figures["near"]["perplexity"], wanted)).min() > 1e-4
    page = (tmp_path / "out" / "table.md").read_text()
    assert "tokens 20 to 32 | tokens 32 to 48" in page and f"| dense | {wanted[0]:.3f} |" in page


def _dense_losses(model, params, tokens) -> np.ndarray:
    """Returns f64[T - 1]: -log p of every token but the first, in one pass."""
    logits = np.asarray(forward(model, params, tokens[None, :].astype(np.int32)), np.float64)[0, :-1]
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), tokens[1:]]


def test_prompts_of_any_length(tmp_path):
    model, params, _ = load_model(str(write_tiny_folder(tmp_path / "tiny")))
    tokens = np.random.default_rng(0).integers(0, 250, 40).astype(np.int32)
    whole = _dense_losses(model, params, tokens)
    for prompt in (1, 17, 39):
        losses, seconds = token_losses(model, params, policy_of(model, TextRow(), {}), tokens, prompt)
        np.testing.assert_allclose(losses, whole[prompt - 1 :], atol=1e-4)
        assert seconds > 0


def test_what_is_refused(run, tmp_path):
    for flags, message in (
        (["--lengths", "32", "64"], "fewer than the last of lengths"),
        (["--lengths", "32", "256"], "context is 128 tokens"),
        (["--texts", str(tmp_path / "none.txt")], "cannot read a text"),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags)
    with pytest.raises(ValueError, match="lengths must grow"):
        LongTextConfig(lengths=(600, 600))
    with pytest.raises(ValueError, match="names of their own"):
        LongTextConfig(rows=(TextRow(), TextRow()))
    model, _, _ = load_model(str(tmp_path / "tiny"))
    for method, options, message in (
        ("tidal", {"budget": 8, "drafted": 2}, "leave out drafted"),
        ("tidal", {"bugdet": 8}, "budget"),
    ):
        with pytest.raises(InputError, match=message):
            policy_of(model, TextRow("mine", method), options)
