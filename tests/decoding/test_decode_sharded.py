"""Parameters spread over devices, and rows over others, give the tokens of one device."""

from tests.support.scale import decoded, start


def test_eight_devices_decode_the_tokens_of_one():
    (found,) = start("decoded", [{"mesh": [2, 1, 4]}], devices=8)  # each of the two key/value heads is cut in half
    assert found == decoded(None)
    assert [len(row) for row in found["greedy"]] == [10, 4, 7, 10]
    assert found["token_recycling"] == found["greedy"]
    assert len({token for row in found["greedy"] for token in row}) > 5  # varied: equal texts say something
