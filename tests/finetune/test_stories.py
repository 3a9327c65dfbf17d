"""Stories: the law is a law, its samples follow it, and texts are judged by it."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from finetune.data import read_data
from finetune.data_configs import StoriesData
from finetune.stories import (
    State,
    law,
    properties,
    read,
    stories,
    story_properties,
    story_tokenizer,
    truth,
    vocabulary,
    write,
)
from models.errors import InputError


def reachable(domain):
    found, todo = set(), [State()]
    while todo:
        state = todo.pop()
        if state not in found:
            found.add(state)
            todo += [following for _, following in law(state, domain).values()]
    return found


def test_every_law_sums_to_one_and_has_known_words():
    states = reachable(0)
    assert len(states) > 50
    for state in states:
        options = law(state, 0)
        assert math.isclose(sum(p for p, _ in options.values()), 1.0)
        assert min(p for p, _ in options.values()) > 0 and set(options) <= set(vocabulary())


def test_a_story_s_probability_is_that_of_its_words_enumerated():
    """Over all texts of three words, probabilities by `read` sum to one."""

    def texts(state, left):
        if not left:
            yield ()
            return
        for word, (_, following) in law(state, 3).items():
            yield from ((word, *rest) for rest in texts(following, left - 1))

    total = sum(math.exp(sum(read(text, 3))) for text in texts(State(), 3))
    assert math.isclose(total, 1.0)


def test_samples_follow_the_law():
    count = Counter(write(1, 0, str(seed)) for seed in range(20_000))
    options = law(State(), 0)
    statistic = sum((count[word] - 20_000 * p) ** 2 / (20_000 * p) for word, (p, _) in options.items())
    others = law(State(), 1)  # planted: the law of another domain
    wrong = sum((count[word] - 20_000 * p) ** 2 / (20_000 * p) for word, (p, _) in others.items())
    freedom = len(options) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)
    assert wrong > freedom + 40 * math.sqrt(2 * freedom)


def test_a_word_that_cannot_stand_there_is_seen_and_reading_begins_anew():
    words = ["mira", "carried", "the", "bread", "and", "sat", ".", "tom", "fed", "a", "cat", "."]
    found = list(read(words, 0))
    assert [value is None for value in found] == [False] * 4 + [True] * 3 + [False] * 5
    assert found[3] == math.log(1e-4) and all(value > math.log(1e-4) for value in found[7:])
    assert truth([words], 0, 0)["possible"] == 8 / 9
    assert truth([words], 7, 0)["possible"] == 1.0


def test_a_pronoun_agrees_with_the_last_name():
    words = ["mira", "fed", "a", "cat", ".", "he", "fed", "a", "cat", "."]
    assert list(read(words, 0))[5] == math.log(1e-4)
    assert list(read([*words[:5], "she"], 0))[5] > math.log(1e-4)


def test_truth_prefers_the_law_s_own_texts():
    own = [write(60, 0, f"{seed}").split() for seed in range(40)]
    assert truth(own, 0, 0)["possible"] == truth(own, 0, 1)["possible"] == 1.0
    assert truth(own, 0, 0)["true_log_prob"] > truth(own, 0, 1)["true_log_prob"] + 0.1
    rng = random.Random(0)
    shuffled = [rng.sample(text, len(text)) for text in own]
    assert truth(shuffled, 0, 0)["possible"] < 0.8


def test_training_and_testing_stories_differ_and_are_the_same_each_time():
    train, test = (stories(30, 40, (0, 1), 5, flag) for flag in (False, True))
    assert not set(train) & set(test)
    assert train == stories(30, 40, (0, 1), 5, False) and train[:10] == stories(10, 40, (0, 1), 5, False)
    assert truth([train[1].split()], 0, 1)["possible"] == 1.0
    with pytest.raises(InputError, match="at least one domain"):
        stories(3, 40, (), 0, False)


def test_the_tokenizer_has_a_word_an_id():
    tokenizer = story_tokenizer()
    text = write(50, 2, "x")
    assert len(tokenizer.encode(text)) == 50 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(vocabulary()) + 1 and tokenizer.stop_ids == ()
    assert tokenizer.encode("mira zzz")[1] == 0


def test_stories_are_data():
    data = read_data(StoriesData(size=6, test_size=3, words=20), story_tokenizer(), 32)
    assert len(data.train) == 6 and len(data.test) == 3 and data.questions == ()
    assert data.train.lengths.tolist() == [20] * 6
    assert data.train.targets.reshape(6, 20).sum() == 6 * 19
    with pytest.raises(InputError, match="words 2"):
        StoriesData(words=1)


def test_what_holds_behind_each_word():
    words = ["mira", "fed", "a", "tired", "cat", "near", "the", "harbour", ".", "she"]
    held = story_properties(words, 0)
    said = [[properties()[place] for place in np.flatnonzero(row)] for row in held]
    assert said[0] == ["word mira", "place verb", "who she"]
    assert said[1] == ["word fed", "place object", "who she", "verb fed"]
    assert said[3] == ["word tired", "place bare", "who she", "verb fed"]
    assert said[4] == ["word cat", "place tail", "who she"]
    assert said[8] == ["word .", "place start", "who she"]
    assert len(set(properties())) == len(properties()) == held.shape[1]
