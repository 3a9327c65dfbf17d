"""Which form runs where."""

import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import choose_form


@pytest.fixture
def on(monkeypatch):
    return lambda name: monkeypatch.setattr(dispatch, "platform", lambda: name)


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_what_was_not_measured_is_left_to_xla(device, on):
    on(device)
    assert choose_form("an operation without an entry", "auto", False, 10**6, None) == "xla"


def test_auto_takes_the_kernel_from_where_it_was_faster(on, monkeypatch):
    monkeypatch.setitem(dispatch.PALLAS_FROM, ("op", "gpu"), 4096)
    on("gpu")
    assert [choose_form("op", "auto", False, slots, None) for slots in (4095, 4096)] == ["xla", "gpu"]
    assert choose_form("op", "auto", False, 4096, "dtype float16") == "xla"
    on("tpu")
    assert choose_form("op", "auto", False, 4096, None) == "xla"


def test_nothing_is_claimed_for_the_cpu():
    assert not [entry for entry in dispatch.PALLAS_FROM if entry[1] == "cpu"]


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_pallas_insists(device, on):
    on(device)
    assert choose_form("op", "pallas", False, 128, None) == device
    with pytest.raises(ValueError, match="op has no kernel for dtype float16. Pass impl='auto'"):
        choose_form("op", "pallas", False, 128, "dtype float16")
