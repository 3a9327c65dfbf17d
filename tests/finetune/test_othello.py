"""Othello's rules against a board that is walked square by square, and against the known numbers of openings."""

import random

import numpy as np
import pytest

from finetune.data import read_data
from finetune.data_configs import OthelloData
from finetune.othello import (
    PASS,
    SQUARES,
    START,
    Boards,
    board_properties,
    games,
    legal,
    opening,
    othello_tokenizer,
    play,
    replay,
    squares,
    surprise,
    vocabulary,
)
from models.errors import InputError

AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]


def turned(board, row, column, player):
    """The slow reference: squares that a disc turns, on {(row, column): player}."""
    if (row, column) in board:
        return []
    found = []
    for down, right in AROUND:
        line, at = [], (row + down, column + right)
        while board.get(at) == -player:
            line.append(at)
            at = (at[0] + down, at[1] + right)
        found += line if board.get(at) == player else []
    return found


def slow_game(words):
    """Yields ({square: player}, player to move, legal squares) behind each word of a game, checking every move."""
    board, player = {(4, 3): 1, (3, 4): 1, (3, 3): -1, (4, 4): -1}, 1
    for word in words:
        if word != START:
            if word != PASS:
                at = divmod(SQUARES.index(word), 8)
                line = turned(board, *at, player)
                assert line, f"{word} turns nothing"
                board |= dict.fromkeys([at, *line], player)
            player = -player
        moves = [(r, c) for r in range(8) for c in range(8) if turned(board, r, c, player)]
        yield board, player, moves
        assert moves or any(turned(board, r, c, -player) for r in range(8) for c in range(8)) or word == words[-1]


def set_of(board, player):
    return {8 * row + column for (row, column), owner in board.items() if owner == player}


def found_set(discs, index):
    return set(np.flatnonzero(squares(discs)[index]))


def test_random_games_are_played_by_the_rules():
    texts = games(12, 3, False)
    passes = 0
    for text in texts:
        words = text.split()
        boards = replay(words)
        moves = legal(boards)
        for index, (board, player, slow) in enumerate(slow_game(words)):
            assert found_set(boards.own, index) == set_of(board, player)
            assert found_set(boards.other, index) == set_of(board, -player)
            assert found_set(moves, index) == {8 * row + column for row, column in slow}
            passes += words[index] == PASS
            assert (words[index + 1 : index + 2] == [PASS]) <= (not slow)
        assert not slow, "the game goes on until neither can move"
    assert passes, "a dozen games have a pass among them"


def test_numbers_of_games_by_their_length():
    boards, counts = opening(1), []
    for _ in range(6):
        moves = squares(legal(boards))
        place, square = np.nonzero(moves)
        counts.append(len(place))
        chosen = np.uint64(1) << square.astype(np.uint64)
        boards = play(Boards(boards.own[place], boards.other[place]), chosen)
    assert counts == [4, 12, 56, 244, 1396, 8200]


def test_lines_do_not_go_round_the_edge():
    """A disc on h1 and one on a2, a row further, are no neighbours; nor is anything beyond the first and last row."""
    bit = {square: np.array([1 << index], np.uint64) for index, square in enumerate(SQUARES)}
    assert legal(Boards(bit["g1"], bit["h1"]))[0] == 0 and legal(Boards(bit["b2"], bit["a2"]))[0] == 0
    assert legal(Boards(bit["a8"], bit["b8"]))[0] == bit["c8"][0]
    assert legal(Boards(bit["c3"], bit["b2"]))[0] == bit["a1"][0]


def test_a_whole_line_is_turned():
    own = np.array([1], np.uint64)
    other = np.array([sum(1 << index for index in range(1, 7))], np.uint64)
    assert legal(Boards(own, other))[0] == 1 << 7
    after = play(Boards(own, other), np.array([1 << 7], np.uint64))
    assert after.own[0] == 0 and after.other[0] == 0xFF


def test_games_are_the_same_each_time_and_testing_ones_differ():
    assert games(5, 1, False) == games(300, 1, False)[:5]
    assert games(3, 1, False, 12) == [" ".join(text.split()[:13]) for text in games(3, 1, False)]
    sides = [set(games(300, 1, test)) for test in (False, True)]
    assert not sides[0] & sides[1] and not sides[0] & set(games(300, 2, False))


def test_moves_are_drawn_evenly():
    """A fourth of the games begins with each of four moves: 1024 of them within four deviations."""
    first = [text.split()[1] for text in games(1024, 0, False)]
    counts = [first.count(move) for move in ("d3", "c4", "f5", "e6")]
    assert sum(counts) == 1024 and max(abs(count - 256) for count in counts) < 4 * (1024 * 3 / 16) ** 0.5


def test_how_likely_each_move_was():
    words = next(text.split() for text in games(99, 0, False) if PASS in text)
    counts = [len(moves) for _, _, moves in slow_game(words)][:-1]
    np.testing.assert_allclose(surprise(words), [np.log(max(count, 1)) for count in counts])
    assert surprise(words)[0] == np.log(4) and surprise(words)[words.index(PASS) - 1] == 0


def test_properties_of_a_known_opening():
    properties = board_properties(["start", "f5", "d6"])
    names = [[SQUARES[i % 64] for i in np.flatnonzero(row)] for row in properties]
    assert names == [["e4", "d5", "d4", "e5"], ["d4", "e4", "d5", "e5", "f5"], ["e4", "e5", "f5", "d4", "d5", "d6"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["f5"], "begins with 'start', got 'f5'"),
        (["start", "a1"], "'a1', is not legal: it may be d3, c4, f5, e6"),
        (["start", "pass"], "'pass', is not legal"),
        (["start", "f5", "f5"], "word 2 of a game, 'f5'"),
        (["start", "x"], "'x', is not legal"),
    ],
)
def test_games_against_the_rules(words, message):
    with pytest.raises(InputError, match=message):
        replay(words)


def test_games_are_data():
    tokenizer = othello_tokenizer()
    assert tokenizer.vocab_size == 63 and len(set(vocabulary())) == 62
    data = read_data(OthelloData(size=6, test_size=3), tokenizer, 80)
    assert len(data.train) == 6 and len(data.test) == 3 and data.questions == ()
    text = games(1, 0, False)[0]
    assert data.train.tokens[: data.train.starts[1]].tolist() == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text and 0 not in tokenizer.encode(text)
    assert read_data(OthelloData(size=6, turns=9), tokenizer, 80).train.lengths.tolist() == [10] * 6
    with pytest.raises(InputError, match="turns must be at least 1"):
        OthelloData(turns=0)
    with pytest.raises(InputError, match="test_size"):
        OthelloData(size=0)


def test_shuffled_moves_are_no_game():
    words = games(1, 0, False)[0].split()
    with pytest.raises(InputError):
        replay([START, *random.Random(0).sample(words[1:], len(words) - 1)])
