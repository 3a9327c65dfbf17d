"""Every config in configs/ loads, and nothing in there is of a kind that no main reads."""

import dataclasses
from pathlib import Path

import pytest

from decoding import METHODS
from decoding.speculative.sizing import LatencyCurve
from experiments import table_kinds
from experiments.bench_constrained import ConstrainedBenchConfig
from experiments.bench_core_infer import CoreInferBenchConfig
from experiments.bench_decoding import BenchConfig
from experiments.bench_isotropy import IsotropyBenchConfig
from experiments.bench_long_context import LongContextBenchConfig
from experiments.bench_speculation import SpeculationBenchConfig
from experiments.bench_text import LongTextConfig
from experiments.bench_train import TrainBenchConfig
from experiments.check_exact import ExactCheckConfig
from experiments.clean_corpus import CleanConfig
from experiments.config import chosen_type, dump_config, load_config
from experiments.decode_config import DecodeConfig
from experiments.generate import GenerateConfig
from experiments.loading import MEASURED
from experiments.method_table import TableConfig
from experiments.train_acceptance_head import HeadConfig
from experiments.train_config import TrainConfig
from experiments.train_draft_head import DraftHeadConfig
from finetune.adapters import ADAPTERS

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = {
    "data": CleanConfig,
    "decode": DecodeConfig,
    "bench/beam": BenchConfig,
    "bench/decode": BenchConfig,
    "bench/exact": ExactCheckConfig,
    "bench/train": TrainBenchConfig,
    "bench/long_context": LongContextBenchConfig,
    "bench/constrained": ConstrainedBenchConfig,
    "bench/core_infer": CoreInferBenchConfig,
    "bench/isotropy": IsotropyBenchConfig,
    "bench/speculation": SpeculationBenchConfig,
    "bench/long_text": LongTextConfig,
    "train": TrainConfig,
    "train/specdec_pp": HeadConfig,
    "train/chimera": DraftHeadConfig,
    "train/clover": DraftHeadConfig,
    "train/eagle": DraftHeadConfig,
    "train/hidden_transfer": DraftHeadConfig,
    "train/medusa": DraftHeadConfig,
    "train/ppd": DraftHeadConfig,
    "generate": GenerateConfig,
}
FILES = sorted(CONFIGS.rglob("*.yaml"))
CURVE = LatencyCurve((1, 4), (1.0, 1.5))


def kind(file: Path) -> str:
    """Returns the config's kind: its folder, or where a folder holds several kinds how its own name begins too."""
    name = str(file.relative_to(CONFIGS).with_suffix(""))
    return max((key for key in KINDS if f"{name}_".startswith(f"{key}_")), key=len, default=name.split("/")[0])


def table_type(file: Path) -> str | None:
    """Returns the `type` of a table's config."""
    return chosen_type(["--config", str(file)])


def config_class(file: Path) -> type:
    """Returns what a config is loaded as."""
    return table_kinds.KINDS[table_type(file)].config if kind(file) == "tables" else KINDS[kind(file)]


def test_every_kind_of_config_is_shipped():
    assert {kind(file) for file in FILES} == {*KINDS, "tables"}
    assert {table_type(file) for file in FILES if kind(file) == "tables"} == set(table_kinds.KINDS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_config_loads_and_its_dump_loads_to_the_same(file, tmp_path):
    cls = config_class(file)
    config = load_config(cls, ["--config", str(file)], prog="test", description="")
    assert config != cls(), f"{file} sets nothing"
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(cls, ["--config", str(again)], prog="test", description="") == config


def chosen(config):
    """Yields (method, options, whether a draft model is named) of a config."""
    if isinstance(config, DecodeConfig):
        yield config.method, config.options, config.draft is not None
    elif isinstance(config, ExactCheckConfig):
        yield from ((checked.method, checked.options, METHODS[checked.method].drafts) for checked in config.methods)
    elif isinstance(config, TableConfig):
        yield from ((row.method, row.options, row.draft and config.draft is not None) for row in config.rows)
    elif isinstance(config, LongTextConfig):
        yield from ((row.method, row.options, False) for row in config.rows)
    elif isinstance(config, LongContextBenchConfig):
        yield from ((side.method, side.options, False) for side in config.sides)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_methods_and_options_exist(file):
    config = load_config(config_class(file), ["--config", str(file)], prog="test", description="")
    for method, options, drafts in chosen(config):
        assert METHODS[method].drafts == drafts
        settings = {name for name in options if name in METHODS[method].settings}
        options = {name: value for name, value in options.items() if name not in settings}
        assert set(options) <= {field.name for field in dataclasses.fields(METHODS[method].options)}
        measured = {"latency": CURVE} if options.get("latency") == MEASURED else {}
        measured |= {"gates": ((0.5,),)} if isinstance(options.get("gates"), str | int) else {}
        measured |= {"direction": (1.0,)} if isinstance(options.get("direction"), str) else {}
        METHODS[method].options(**{**options, **measured})


def test_every_adapter_has_a_config_of_its_name():
    for name in ADAPTERS:
        argv = ["--config", str(CONFIGS / "train" / f"{name}.yaml")]
        assert load_config(TrainConfig, argv, prog="test", description="").adapter.type == name


def test_every_method_has_a_config():
    shipped = {load_config(DecodeConfig, ["--config", str(file)], prog="test", description="").method
               for file in FILES if file.parent.name == "decode"}  # fmt: skip
    assert shipped | {"sample"} == set(METHODS)


def test_every_exact_method_is_checked_on_a_real_model():
    config = load_config(
        ExactCheckConfig, ["--config", str(CONFIGS / "bench" / "exact.yaml")], prog="test", description=""
    )
    checked = {method.method for method in config.methods}
    assert checked >= {name for name, method in METHODS.items() if method.label == "exact"} - {"greedy"}
