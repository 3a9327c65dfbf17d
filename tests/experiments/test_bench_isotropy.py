"""Isotropy by layer and language on a tiny model, and texts that cannot be read."""

import json
import sys

import pytest

from experiments import bench
from experiments.bench_isotropy import IsotropyBenchConfig, read_languages
from models.errors import InputError
from tests.support.tiny_folder import write_tiny_folder


def test_every_layer_and_language_of_a_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    model = write_tiny_folder(tmp_path / "tiny", max_length=600)
    argv = ["bench", "--config", "configs/bench/isotropy.yaml", "--models", str(model), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tiny"]
    assert len(found) == 6 and all(set(layers) == {"0", "1", "normed"} for layers in found.values())
    assert all(0 < own["raw"] < 1 for layers in found.values() for own in layers.values())
    page = (tmp_path / "out" / "table.md").read_text()
    assert f"| tiny | Chinese | {found['Chinese']['0']['raw']:.2f} (" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no texts"),
        ('{"language": "English", "text": "a"}\n{"language": "English"}', r"texts\.jsonl:2: wanted an object like"),
        ('{"language": 3, "text": "a"}', r"texts\.jsonl:1: the language must be text, got 3"),
        ('{"language": "English", "text": " "}', r"texts\.jsonl:1: the text is empty"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "texts.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_languages(tmp_path / "texts.jsonl")
    with pytest.raises(InputError, match="no such file of texts"):
        read_languages(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="models is empty"):
        IsotropyBenchConfig(models=())
