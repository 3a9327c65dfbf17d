"""What the tests of several kernels take."""

import pytest

from pallas_kernels import dispatch


@pytest.fixture(params=["tpu", "gpu"])
def form(request, monkeypatch):
    """The options that run one kernel's interpreter."""
    monkeypatch.setattr(dispatch, "platform", lambda: request.param)
    return {"impl": "pallas", "interpret": True}
