"""Dolphin's table at its smallest size, and the formula of costs against what XLA counts."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.config import load_config
from experiments.dolphin_table import DolphinTableConfig, with_models
from experiments.reading_costs import pass_cost, reading_cost, request_cost
from experiments.reproduce import main
from models.cache import init_cache
from models.config import AttentionConfig, BlockConfig, DecoderConfig, MLPConfig, MoEConfig
from models.decoder import Decoder
from models.encoder_decoder import init_params
from models.errors import InputError

TABLE = Path(__file__).parents[2] / "configs" / "tables" / "dolphin.yaml"
BLOCK = BlockConfig(AttentionConfig(4, 2, 32), MLPConfig(384))
WIDE = DecoderConfig("llama", vocab_size=512, width=128, blocks=(BLOCK, BLOCK), max_length=256, tied_embeddings=True)


def counted(tokens: int, slots: int) -> dict[str, float]:
    """What XLA counts of one pass over tokens into a cache of so many slots, with logits of all."""
    model = Decoder(WIDE)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    cache = jax.eval_shape(lambda: init_cache([b.attention for b in WIDE.blocks], 1, slots, jnp.float32))
    run = jax.jit(lambda params, tokens, cache: model.apply({"params": params}, tokens, cache=cache).logits)
    return run.lower(params, jax.ShapeDtypeStruct((1, tokens), jnp.int32), cache).compile().cost_analysis()


@pytest.mark.parametrize(("tokens", "slots"), [(64, 64), (32, 160)])
def test_operations_of_the_formula_are_those_that_xla_counts(tokens, slots):
    ours = pass_cost(WIDE, tokens, slots - tokens, tokens).flops
    assert ours == pytest.approx(counted(tokens, slots)["flops"], rel=0.05)
    assert abs(2 * ours / counted(tokens, slots)["flops"] - 1) > 0.05, "a factor of two would show"


def test_bytes_of_the_formula_are_most_of_what_a_step_moves():
    """XLA counts those of intermediate arrays too, and a write to the cache as the whole of it."""
    ours, theirs = pass_cost(WIDE, 1, 63, 1).bytes, counted(1, 64)["bytes accessed"]
    assert 0.6 < ours / theirs < 1.05


def test_requests_are_sums_of_passes():
    whole = request_cost(WIDE, 600, 10, 3)
    assert whole.flops == pytest.approx(
        sum(pass_cost(WIDE, n, held, 0).flops for n, held in ((512, 0), (97, 512)))
        + sum(pass_cost(WIDE, 1, 609 + step, 1).flops for step in range(3))
    )
    short = request_cost(WIDE, 600, 10, 3, compressor=WIDE, memory=4)
    rest = request_cost(WIDE, 4, 10, 3)
    assert short.bytes == pytest.approx(rest.bytes + reading_cost(WIDE, 600).bytes + pass_cost(WIDE, 4, 600, 0).bytes)
    small = dataclasses.replace(WIDE, blocks=(BLOCK,))
    deep = dataclasses.replace(WIDE, blocks=(BLOCK,) * 12)
    many = [request_cost(deep, n, 8, 1).flops / request_cost(deep, n, 8, 1, compressor=small, memory=4).flops
            for n in (64, 1024, 8192)]  # fmt: skip
    assert 1 < many[0] < many[1] < many[2] < 12.5
    mixed = dataclasses.replace(BLOCK, mlp=MoEConfig(2, 1, MLPConfig(8)))
    with pytest.raises(InputError, match="dense MLPs"):
        pass_cost(dataclasses.replace(WIDE, blocks=(mixed,)), 1, 0, 0)


def test_the_smoke_preset_writes_a_table_and_keeps_what_is_measured(tmp_path, capsys):
    argv = [str(TABLE), "--preset", "smoke", "--out", str(tmp_path / "out")]
    main(argv)
    page = capsys.readouterr().out
    assert "## Stage: restoration" in page
    assert "| 16384 |" in page and "| 64 | " in page
    assert "reproduced" in page and "**not measured** here" in page
    assert {"table.md", "table.csv", "plot.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    config = load_config(DolphinTableConfig, ["--config", *argv], prog="test", description="")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*.json")}
    assert len(times) == 1 + 4
    main(argv)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    compressor = Path(with_models(config).dolphin.compressor)
    assert compressor.name == "compressor" and compressor.is_relative_to(config.folder / "scratch")


def test_a_table_without_a_compressor_is_refused():
    run = dataclasses.replace(DolphinTableConfig().run, dolphin=None)
    with pytest.raises(ValueError, match="run must have a compressor"):
        DolphinTableConfig(run=run)
