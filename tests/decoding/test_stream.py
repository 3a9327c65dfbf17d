"""The pieces of a stream joined are the text of one call, and no character is torn."""

import numpy as np
import pytest

from decoding import make_decode_fn, stream
from models.errors import InputError
from tests.support.decode_reference import PROMPTS, ROOM, small_law_model, texts

PROMPT = PROMPTS[4]


class ThreeTokenCharacters:
    """A tokenizer whose characters take three tokens each; torn ones read as the replacement character."""

    def decode(self, ids: list[int]) -> str:
        """Returns the text of all tokens."""
        whole = len(ids) - len(ids) % 3
        text = "".join(chr(0x4E00 + sum(ids[i : i + 3])) for i in range(0, whole, 3))
        return text + ("\ufffd" if len(ids) > whole else "")


class BytesTokenizer:
    """The k-th token is the k-th byte of one text with characters of one to four bytes."""

    TEXT = "aß漢🙂b🙂ß漢 aß"

    def decode(self, ids: list[int]) -> str:
        """Returns as many bytes of the text as there are tokens."""
        return self.TEXT.encode()[: len(ids)].decode(errors="replace")


@pytest.fixture(scope="module")
def decode_fn(tiny):
    return make_decode_fn(tiny[0], max_new_tokens=ROOM)


@pytest.mark.parametrize("steps", [1, 4, 100])
@pytest.mark.parametrize("tokenizer", [ThreeTokenCharacters(), BytesTokenizer()], ids=["three tokens", "bytes"])
def test_pieces_joined_are_the_text_of_one_call(tiny, decode_fn, tokenizer, steps):
    text = tokenizer.decode(texts(decode_fn(tiny[1], [PROMPT]))[0])
    pieces = list(stream(decode_fn, tiny[1], tokenizer, PROMPT, steps=steps))
    assert "".join(pieces) == text
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3 if steps == 1 else len(pieces) <= -(-ROOM // steps)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("wanted", [1, 2, 10, 23])
def test_a_character_that_never_ends_is_told_once_at_the_end(tiny, decode_fn, wanted, steps):
    tokenizer = ThreeTokenCharacters()
    pieces = list(stream(decode_fn, tiny[1], tokenizer, PROMPT, steps=steps, max_new_tokens=wanted))
    assert "".join(pieces) == tokenizer.decode(texts(decode_fn(tiny[1], [PROMPT], max_new_tokens=wanted))[0])
    assert not any("\ufffd" in piece for piece in pieces[:-1]) and pieces[-1].endswith("\ufffd")


def test_pieces_come_as_soon_as_a_character_is_whole(tiny, decode_fn):
    pieces = list(stream(decode_fn, tiny[1], ThreeTokenCharacters(), PROMPT))
    assert [len(piece) for piece in pieces] == [1] * (ROOM // 3)


def test_first_piece_comes_before_the_last_step(tiny, decode_fn, monkeypatch):
    calls = []
    advance = decode_fn.advance
    monkeypatch.setattr(decode_fn, "advance", lambda *args: calls.append(args[-1]) or advance(*args))
    assert next(stream(decode_fn, tiny[1], ThreeTokenCharacters(), PROMPT)) and calls == [1, 1, 1]


def test_the_last_state_is_returned(tiny, decode_fn):
    states = []

    def caller():
        states.append((yield from stream(decode_fn, tiny[1], BytesTokenizer(), PROMPT, steps=4)))

    list(caller())
    output = decode_fn(tiny[1], [PROMPT])
    np.testing.assert_array_equal(states[0].tokens, output.tokens)
    assert int(states[0].stats.steps[0]) == ROOM and bool(states[0].done[0])


@pytest.mark.parametrize("steps", [0, -1])
def test_a_stream_that_would_never_move_is_an_error(tiny, decode_fn, steps, monkeypatch):
    monkeypatch.setattr(decode_fn, "advance", lambda *args: pytest.fail("the stream goes round and round"))
    with pytest.raises(InputError, match=f"steps must be at least 1, got {steps}"):
        list(stream(decode_fn, tiny[1], BytesTokenizer(), PROMPT, steps=steps))


def test_zero_new_tokens_yield_nothing(tiny, decode_fn):
    assert list(stream(decode_fn, tiny[1], ThreeTokenCharacters(), PROMPT, max_new_tokens=0)) == []


@pytest.mark.parametrize("steps", [1, 4])
def test_stream_ends_with_the_stop_token(tiny, decode_fn, steps):
    text = texts(decode_fn(tiny[1], [PROMPT]))[0]
    stop = text[9]
    stopped = text[: text.index(stop) + 1]
    assert 1 < len(stopped) < ROOM
    fn = make_decode_fn(tiny[0], max_new_tokens=ROOM, stop_tokens=[stop])
    pieces = list(stream(fn, tiny[1], ThreeTokenCharacters(), PROMPT, steps=steps))
    assert "".join(pieces) == ThreeTokenCharacters().decode(stopped)


def test_sampled_stream_follows_the_seed():
    model, params = small_law_model()
    tokenizer, fn = ThreeTokenCharacters(), make_decode_fn(model, "sample", max_new_tokens=ROOM)
    one_call = tokenizer.decode(texts(fn(params, [[2, 0, 3]], 5, temperature=1.5))[0])
    assert "".join(stream(fn, params, tokenizer, [2, 0, 3], 5, temperature=1.5)) == one_call
    assert "".join(stream(fn, params, tokenizer, [2, 0, 3], 6, temperature=1.5)) != one_call
