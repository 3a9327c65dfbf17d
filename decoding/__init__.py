"""From logits to tokens: jitted decoding loops over the models of `models`."""

from decoding.decode import DecodeFn as DecodeFn
from decoding.decode import make_decode_fn as make_decode_fn
from decoding.method import WithDraft as WithDraft
from decoding.registry import METHODS as METHODS
from decoding.speculative.specdec_pp import WithHead as WithHead
from decoding.state import DecodeOutput as DecodeOutput
from decoding.stream import stream as stream
