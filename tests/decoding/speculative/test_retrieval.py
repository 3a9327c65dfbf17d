"""Chunks make up their text, retrieval finds what shares the question's words, and keeps the document's order."""

import random

import pytest
import tokenizers

from decoding.speculative.retrieval import chunks, retrieve, shorten
from experiments.needles import needle_document
from models.errors import InputError
from models.weights.tokenizer import Tokenizer

TEXT = (
    "First line of a paragraph, with a clause; and another: a third.\nSecond line! Does it end? It does.  Two spaces."
    "\n\n\n\tA second paragraph.\r\n" + "word " * 30 + "\n\n" + "x" * 50 + "。一二三，四五六。\n"
)


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per word and per sign."""
    model = tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend, None, None, None, (), None)


@pytest.mark.parametrize("count", [len, words], ids=["characters", "words"])
@pytest.mark.parametrize("size", [1, 2, 7, 20, 1000])
def test_chunks_make_up_the_text_and_none_is_too_long(count, size):
    rng = random.Random(size)
    others = ["".join(rng.choice("ab .,;!?\n\t。，") for _ in range(rng.randrange(1, 200))) for _ in range(40)]
    for text in (TEXT, *others):
        parts = chunks(text, count, size)
        assert "".join(parts) == text and all(parts)
        assert all(count(part) <= size for part in parts)
    assert chunks("", count, size) == []


def test_cuts_are_made_at_the_best_places():
    assert chunks("One two.\n\nThree four.\n\nFive", words, 4) == ["One two.\n\nThree four.\n\n", "Five"]
    assert chunks("one two\nthree four\nfive", words, 2) == ["one two\n", "three four\n", "five"]
    assert chunks("It is. It was. Yes", words, 2) == ["It is. ", "It was. ", "Yes"]
    assert chunks("if it is, then it was; yes", words, 3) == ["if it is, ", "then it was; ", "yes"]
    assert chunks("one two three", words, 2) == ["one two ", "three"]
    assert chunks("abcde", len, 2) == ["ab", "cd", "e"]
    assert chunks("ab", lambda text: 3 * len(text), 2) == ["a", "b"], "a character cannot be cut"


def test_retrieval_finds_shared_words_and_keeps_the_order(capfd, caplog):
    parts = ["The cat sat.", "Room 7 is red.", "nothing", "", "A dog ran.", "room 8 is blue", "The room: 7, 7!"]
    assert retrieve(parts, "What is in Room 7?", 2) == [1, 6]
    assert retrieve(parts, "DOG", 1) == [4]
    assert retrieve(parts, "dog cat", 3) == [0, 1, 4], "of chunks that match nothing the first is taken"
    assert retrieve(parts, "zebra ?!", 2) == [0, 1] and retrieve(parts, "", 1) == [0]
    assert retrieve(["...", "!", "?"], "a", 2) == [0, 1]
    for count in range(1, 9):
        found = retrieve(parts, "a red room", count)
        assert found == sorted(set(found)) and len(found) == min(count, len(parts))
    out, err = capfd.readouterr()
    assert not out and not err and not caplog.records, "no progress bars, no debugging"


def test_common_words_count_less_than_rare_ones():
    parts = [f"the code of the room {room} is in the book of the house" for room in range(20, 60)]
    assert all(retrieve(parts, f"what is the code of the room {room}", 1) == [room - 20] for room in range(20, 60))


def test_a_shortened_document_has_the_answer_within_its_budget(tokenizer):
    found = {1: 0, 2: 0}
    for hops in found:
        for seed in range(20):
            document, question, answer = needle_document(random.Random(seed), 1500, hops)
            short = shorten(document, question, tokenizer, 256, size=64)
            assert len(tokenizer.encode(short)) <= 256
            places = [document.index(part) for part in short.split("\n\n")]
            assert places == sorted(places), "chunks must stand in the document's order"
            found[hops] += answer in short
    assert found[1] == 20 and found[2] < 12, "the second hop shares no word with the question"


def test_a_document_within_the_budget_stays_as_it_is(tokenizer):
    document = "  Some text.\n\n\nMore text.  "
    assert shorten(document, "text?", tokenizer, 6, size=2) == document
    assert shorten(document, "More?", tokenizer, 3, size=3) == "More text."


def test_what_cannot_be(tokenizer):
    for document in ("", " \n\t"):
        with pytest.raises(InputError, match="document is empty"):
            shorten(document, "what?", tokenizer, 100, size=10)
    with pytest.raises(InputError, match="at least one chunk, 128 tokens, got 100"):
        shorten("text", "what?", tokenizer, 100)
    for call in (lambda: chunks("text", len, 0), lambda: shorten("a b", "a", tokenizer, 1, size=0)):
        with pytest.raises(InputError, match="size must be"):
            call()
    with pytest.raises(InputError, match="count must be"):
        retrieve(["a"], "a", 0)
