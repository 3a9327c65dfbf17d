"""Training as two processes, as a user starts it: one folder, written once, with the losses of one process."""

import json
import sys
from pathlib import Path

import numpy as np

from experiments import train
from finetune.adapters.saved import base_of, load_adapter
from models import load_model
from tests.support.scale import free_address, start
from tests.support.tiny_folder import write_tiny_folder

SMALL = """
data: {type: generated, tasks: [double, larger], size: 60, test_size: 12}
optimizer: {learning_rate: 1e-2}
steps: 3
batch_size: 4
length: 48
log_every: 1
evaluation: {every: 3, batches: 1, examples: 2, max_new_tokens: 4}
saving: {every: 2}
"""
NEW = "scratch: {layers: 1, width: 16, heads: 2, kv_heads: 1, mlp_width: 24, max_length: 64}\nadapter: null\n"


def figures(folder: Path) -> list[float]:
    """Returns the losses of updates and the figures of the evaluation, in order; each is logged once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    (measured,) = [[line["eval/loss"], line["eval/exact_match"]] for line in lines if "eval/loss" in line]
    assert len(losses) == 3
    return losses + measured


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    write_tiny_folder(tmp_path / "model")
    (tmp_path / "new.yaml").write_text(SMALL + NEW)
    (tmp_path / "lora.yaml").write_text(f"model: {tmp_path / 'model'}\n{SMALL}")

    def flags(kind: str, name: str) -> list[str]:
        return ["--config", str(tmp_path / f"{kind}.yaml"), "--run_dir", str(tmp_path / f"{kind}_{name}")]

    spread = ["--mesh.data", "1", "--mesh.fsdp", "2"]
    runs = [flags("new", "two") + spread, flags("lora", "two")]
    arguments = {"coordinator": free_address(), "runs": runs}
    assert start("trained", [arguments | {"process_id": index} for index in range(2)], devices=1) == [0, 1]
    for kind in ("new", "lora"):
        monkeypatch.setattr(sys, "argv", ["train", *flags(kind, "one"), "--mesh.data", "1", "--mesh.tensor", "2"])
        train.main()
        one, two = (figures(tmp_path / f"{kind}_{name}") for name in ("one", "two"))
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=0)
    one, two = (load_model(tmp_path / f"new_{name}" / "model").params["embedding"] for name in ("one", "two"))
    np.testing.assert_allclose(one["embedding"], two["embedding"], atol=1e-4)
    base = base_of("model", load_model(tmp_path / "model").params)
    assert load_adapter(tmp_path / "lora_two" / "adapter", base).config.type == "lora"
