"""Texts that are taken apart come together again; spans are whole words; what is missing is said."""

import numpy as np
import pytest

from finetune.code_pairs import code_pairs
from finetune.code_tokenizer import SENTINELS, code_tokenizer
from finetune.denoising import Split, complete, corrupt, restore, special_tokens, split, word_table
from models.errors import InputError
from models.weights.byte_tokenizer import byte_tokenizer

ROLES = ("cls", "clm", "match", "code", "text", "end", "sentinels")


@pytest.fixture(scope="module")
def case():
    """(tokenizer, special ids, words, 60 functions as ids)."""
    tokenizer = code_tokenizer()
    texts = [np.array(tokenizer.encode(one.completion)) for one in code_pairs(60, 3, False)]
    return tokenizer, special_tokens(tokenizer, ROLES), word_table(tokenizer), texts


def corrupted(case, seed=0, **settings):
    _, specials, words, texts = case
    rng = np.random.default_rng(seed)
    return [corrupt(text, words.starts(text), specials, rng, **settings) for text in texts]


@pytest.mark.parametrize("settings", [{}, {"share": 0.5, "longest": 2}, {"share": 0.9, "longest": 9}], ids=str)
def test_a_corrupted_text_comes_together_again(case, settings):
    _, specials, _, texts = case
    for one, text in zip(corrupted(case, **settings), texts, strict=True):
        assert restore(one, specials) == text.tolist()


def test_sentinels_stand_in_order_and_once_on_each_side(case):
    _, specials, _, _ = case
    for one in corrupted(case):
        read, written = ([i for i in side if i in specials.sentinels] for side in one)
        assert read == written == list(specials.sentinels[: len(read)])
        assert one.target[0] == specials.sentinels[0] and one.target[-1] == specials.end


def test_the_share_that_is_taken_is_wanted_to_one_span(case):
    _, specials, _, texts = case
    for one, text in zip(corrupted(case), texts, strict=True):
        sizes = np.diff([*(i for i, t in enumerate(one.target) if t in specials.sentinels), len(one.target) - 1]) - 1
        budget = round(0.15 * len(text))
        assert budget <= sizes.sum() < budget + sizes.max()


def test_spans_are_of_whole_words_one_to_five_all_equally_often(case):
    """Long texts of words of one token: with a share this small no span meets another."""
    tokenizer, specials, words, _ = case
    text = np.array(tokenizer.encode("\n" * 3000))
    assert words.starts(text).all()
    rng = np.random.default_rng(1)
    found = []
    for _ in range(40):
        one = corrupt(text, words.starts(text), specials, rng, share=0.02)
        places = [i for i, t in enumerate(one.target) if t in specials.sentinels]
        found += (np.diff([*places, len(one.target) - 1]) - 1).tolist()
    counts = np.bincount(found, minlength=6)
    assert set(found) == {1, 2, 3, 4, 5} and np.mean(found) == pytest.approx(3, abs=0.2)
    assert counts[1:].min() > 0.7 * counts[1:].mean()


def test_words_are_known_whatever_they_were_cut_into(case):
    tokenizer, _, words, _ = case
    text = "def solve(numbers):\n    xylophone_7 = numbers.zzqk + 41"
    tokens = np.array(tokenizer.encode(text))
    pieces = np.split(tokens, np.flatnonzero(words.starts(tokens))[1:])
    found = [tokenizer.decode(piece).strip() for piece in pieces]
    assert [one for one in found if one.isidentifier() or one.isdigit()] == [
        *("def", "solve", "numbers", "xylophone_7", "numbers", "zzqk", "41"),
    ]
    assert len(tokens) > len(pieces) and "".join(tokenizer.decode(piece) for piece in pieces) == text


def test_a_text_is_cut_behind_10_to_90_percent(case):
    _, specials, _, _ = case
    text, rng = np.arange(200, 300), np.random.default_rng(0)
    cuts = [split(text, specials, rng) for _ in range(400)]
    lengths = [len(one.source) - 1 for one in cuts]
    assert (min(lengths), max(lengths)) == (10, 90) and np.mean(lengths) == pytest.approx(50, abs=3)
    for one in cuts:
        assert one.source[0] == specials.clm and one.source[1:] + one.target == [*text.tolist(), specials.end]
    assert {len(split(text[:2], specials, rng).source) for _ in range(9)} == {2}
    assert complete(text, specials) == Split([specials.clm], [*text.tolist(), specials.end])


def test_what_is_missing_is_said(case):
    tokenizer, specials, words, texts = case
    with pytest.raises(InputError, match=r"has no \[CLM\], <extra_id_0>, which these losses need.*tokenizer 'code'"):
        special_tokens(byte_tokenizer(), ("clm", "end", "sentinels"))
    few = specials._replace(sentinels=specials.sentinels[:1])
    long = np.concatenate(texts[:9])
    with pytest.raises(InputError, match="spans to be taken out, but the tokenizer has 1 sentinels"):
        corrupt(long, words.starts(long), few, np.random.default_rng(0))
    first, second = specials.sentinels[:2]
    with pytest.raises(InputError, match="sentinel 1 stands where 0 was to come"):
        restore(Split([second], [second, 9, specials.end]), specials)
    with pytest.raises(InputError, match="begin without a sentinel"):
        restore(Split([first], [400, specials.end]), specials)
    with pytest.raises(InputError, match=r"has sentinels \[\], the spans are 1"):
        restore(Split([400], [first, 400, specials.end]), specials)
    with pytest.raises(InputError, match="needs at least 2 tokens, got 1"):
        split(texts[0][:1], specials, np.random.default_rng(0))


def test_the_tokenizer_is_the_same_whenever_it_is_made(case):
    tokenizer = case[0]
    code_tokenizer.cache_clear()
    assert code_tokenizer().backend.to_str() == tokenizer.backend.to_str()
    assert len(set(case[1].sentinels)) == len(SENTINELS) and tokenizer.vocab_size == 640
    text = "λ(x) → 'naïve'\t# \x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
