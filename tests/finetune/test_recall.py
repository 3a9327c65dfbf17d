"""Facts to recall: where they stand, what is asked, that nothing else gives the answer."""

import random

import pytest

from finetune.data import read_data
from finetune.data_configs import RecallData
from finetune.recall import recall_example, recall_examples
from finetune.stories import names_and_things, story_tokenizer, vocabulary
from models.errors import InputError

NAMES, THINGS, FILLER = names_and_things()


def facts(example, questions):
    """({name: thing} of the text, [(name, thing)] of the questions)."""
    words = f"{example.prompt}{example.completion}".split()
    text, asked = words[: -3 * questions], words[-3 * questions :]
    known = {word: text[i + 1] for i, word in enumerate(text) if word in NAMES}
    return text, known, [(asked[i + 1], asked[i + 2]) for i in range(0, len(asked), 3)]


def test_kinds_of_words_are_apart():
    assert len({*NAMES, *THINGS, *FILLER, "the"}) == len(NAMES) + len(THINGS) + len(FILLER) + 1
    assert {*NAMES, *THINGS, *FILLER, "the"} <= set(vocabulary())


@pytest.mark.parametrize(("words", "count"), [(16, 8), (40, 5), (200, 24)])
def test_every_fact_is_asked_for_in_training(words, count):
    for example in recall_examples(20, words, count, 0, False):
        text, known, asked = facts(example, count)
        assert (len(text), len(known)) == (words, count)
        assert dict(asked) == known and set(known.values()) <= set(THINGS)
        assert set(text) <= {*known, *known.values(), *FILLER}


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_one_fact_is_asked_for_at_its_depth(depth):
    for seed in range(30):
        example = recall_example(random.Random(seed), 100, 4, depth)
        text, known, ((name, thing),) = facts(example, 1)
        assert known[name] == thing and len(known) == 4
        assert abs(text.index(name) - depth * 98) <= 8, "as near as the other facts let it"


def test_examples_come_from_the_seed_alone():
    assert recall_examples(5, 32, 4, 0, True) == recall_examples(9, 32, 4, 0, True)[:5]
    both = [{e.prompt for e in recall_examples(50, 32, 4, 0, test)} for test in (False, True)]
    assert not both[0] & both[1]


def test_rows_to_train_on_and_questions():
    data = read_data(RecallData(size=6, test_size=4, words=24, facts=4), story_tokenizer(), 40)
    assert (len(data.train), len(data.questions)) == (6, 4)
    assert data.train.lengths.tolist() == [24 + 3 * 4] * 6 and data.train.targets.sum() == 6 * (3 * 4 - 2)
    question = data.questions[0]
    assert len(question.tokens) == 26 and question.example.completion.strip() in THINGS


@pytest.mark.parametrize("settings", [{"facts": 0}, {"words": 15}, {"size": 0}])
def test_settings_that_do_not_fit(settings):
    with pytest.raises(InputError, match="at least"):
        RecallData(**settings)


@pytest.mark.parametrize(("words", "count"), [(64, 25), (7, 4), (7, 0)])
def test_texts_that_do_not_fit(words, count):
    with pytest.raises(InputError, match="facts must be 1 to 24"):
        recall_example(random.Random(0), words, count)
