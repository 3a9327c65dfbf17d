"""Parameters spread over devices give the tokens of one device."""

import pytest

from tests.support.scale import decoded, start

MESHES = [[2, 1, 4], [2, 2, 2]]  # (data, fsdp, tensor): with `tensor` 4 the two key/value heads are cut in half


@pytest.fixture(scope="module")
def alone() -> dict:
    return decoded(None)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_decode_the_tokens_of_one(mesh, alone):
    (found,) = start("decoded", [{"mesh": mesh}], devices=8)
    assert found == alone
    assert [len(row) for row in found["greedy"]] == [10, 4, 7, 10]
    assert found["token_recycling"] == found["greedy"]
    assert len({token for row in found["greedy"] for token in row}) > 5  # varied: equal texts say something
