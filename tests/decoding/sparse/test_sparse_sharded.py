"""Sparse decoding with heads spread over devices, and rows over others, gives the tokens of one device."""

from tests.support.scale import SPARSE, decoded_sparsely, start


def test_four_devices_decode_the_tokens_of_one():
    (found,) = start("decoded_sparsely", [{"mesh": [2, 1, 2]}], devices=4)  # two rows and one key/value head each
    assert found == decoded_sparsely(None)
    for method in SPARSE:
        assert [len(row) for row in found[method]] == [10, 4, 7, 10]
        assert found[method] != found["greedy"], f"{method} must leave something out, or equal texts say little"
