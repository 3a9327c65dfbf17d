"""The checks of kernels on a machine without an accelerator, and what is written of times."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import device_cases, device_checks
from experiments.device_cases import KERNEL, XLA, Case


def test_without_an_accelerator_kernels_are_interpreted(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr(device_checks, "PARITY", {"bfloat16": 1e-2})
    device_checks.main(["--out", str(tmp_path / "out")])
    assert "nothing to time" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "checks.json").read_text())
    assert found["timings"] == [] and all(row["passed"] for row in found["parity"])
    assert len({row["kernel"] for row in found["parity"]}) == len(found["parity"]) == 7
    page = (tmp_path / "out" / "table.md").read_text()
    assert "nothing was timed" in page and page.count("| yes |") == 7


def case(kernel) -> Case:
    def fails(q):
        raise NotImplementedError("no such | form\nat all")

    make = lambda key: (jax.random.normal(key, (64, 64)),)  # noqa: E731
    sides = {KERNEL: kernel, XLA: lambda q: q * 2.0, "jax.nn xla": fails}
    return Case("doubling", 64, None, make, sides, 2 * 64 * 64 * 4, {XLA: lambda q: (q + 0.0,)})


@pytest.mark.parametrize("kernel", [lambda q: q * 2.1, lambda q: jnp.linalg.no_such_function(q)])
def test_a_kernel_that_differs_or_fails_is_told(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr(device_cases, "cases", lambda *sizes, **options: [case(kernel)])
    with pytest.raises(SystemExit, match="error: doubling, doubling differ"):
        device_checks.main(["--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text().count("| NO |") == 2


def test_times_beside_the_floor(monkeypatch, tmp_path):
    monkeypatch.setattr(device_checks, "LEAST_BYTES", 3 * 2 * 64 * 64 * 4)
    report = device_checks.Report(tmp_path)
    report.found["bandwidth"] = device_checks.copy_bandwidth(1 << 16)
    report.add("timings", device_checks.time_case(case(lambda q: q * 2.0), 2e9))
    (row,) = json.loads((tmp_path / "checks.json").read_text())["timings"]
    assert row["floor"] == pytest.approx(32768 / 2e9 * 1e6)
    assert row["microseconds"][KERNEL] > 0 and row["microseconds"][XLA] > 0
    assert row["microseconds"]["jax.nn xla"] == "NotImplementedError: no such | form"
    last = (tmp_path / "table.md").read_text().strip().splitlines()[-1].split(" | ")
    assert last[0] == "| doubling" and last[5:8] == ["NotImplementedError: no such / form", "-", "16.4"]
    assert float(last[8]) == pytest.approx(row["microseconds"][KERNEL] / row["floor"], abs=0.06)


def test_operands_follow_each_other():
    """Each set waits for the result of the one before it."""
    seen = []
    run = device_checks._one_after_another(lambda q, k: seen.append(q) or q + k)
    sets = [(jnp.full((2, 2), 1e30), jnp.zeros((2, 2))), (jnp.ones((2, 2)), jnp.zeros((2, 2)))]
    assert float(run(sets)) == 2.0 and float(seen[1][0, 0]) == 2.0


def test_every_case_has_both_forms_and_its_bytes():
    sizes = device_cases.Sizes(batch=2)
    found = list(device_cases.cases(sizes, (1024, 4096), (1, 8)))
    assert len(found) == 2 * (2 * 2 + 3 + 2)
    for each in found:
        shapes = jax.eval_shape(each.make, jax.random.key(0))
        results = jax.eval_shape(each.sides[XLA], *shapes)
        moved = sum(x.size * x.dtype.itemsize for x in (*shapes, results) if x.dtype != jnp.int32)
        assert KERNEL in each.sides and moved == each.num_bytes, each
        for name in each.sides.keys() - {KERNEL, XLA}:
            own = jax.eval_shape(each.prepare[name], *shapes)
            with jax.numpy_dtype_promotion("standard"):  # which jax.nn relies on
                assert jax.eval_shape(each.sides[name], *own).size == results.size


BAD_SIZES = [["--slots", "100"], ["--slots", "640", "700"], ["--widths", "0"], ["--widths", "300"]]


@pytest.mark.parametrize("flags", BAD_SIZES)
def test_bad_sizes(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        device_checks.main(flags)
    assert f"got ({flags[1]}," in capsys.readouterr().err
