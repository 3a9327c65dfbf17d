"""Every config in configs/ loads, and nothing in there is of a kind that no main reads."""

from pathlib import Path

import pytest

from experiments.bench import BenchConfig
from experiments.config import dump_config, load_config
from experiments.decode import DecodeConfig

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = {"decode": DecodeConfig, "bench": BenchConfig}
FILES = sorted(CONFIGS.rglob("*.yaml"))


def test_every_kind_of_config_is_shipped():
    assert {file.relative_to(CONFIGS).parts[0] for file in FILES} == set(KINDS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_config_loads_and_its_dump_loads_to_the_same(file, tmp_path):
    cls = KINDS[file.relative_to(CONFIGS).parts[0]]
    config = load_config(cls, ["--config", str(file)], prog="test", description="")
    assert config != cls(), f"{file} sets nothing"
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(cls, ["--config", str(again)], prog="test", description="") == config
