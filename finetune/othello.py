"""Othello: the rules on many boards at once, random games as texts, and what is on the board behind every move.

A game is a text of words, "start f5 d6 c3 ...": the squares where discs are put, and "pass" where a player has no move
and the other has one. It ends when neither has. Boards are pairs of 64-bit numbers, the discs of the player to move and
those of the other one: bit 8 r + c is the square in column c (a to h) and row r (1 to 8).

Axis letters: N boards or games, T tokens of a game.
"""

import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from models.errors import InputError
from models.weights.tokenizer import Tokenizer

START, PASS = "start", "pass"
SQUARES = tuple(f"{column}{row}" for row in range(1, 9) for column in "abcdefgh")
_UNKNOWN = "<unknown>"
_BLOCK = 256  # games that are drawn together
_LONGEST = 120  # turns; no game has more than 60 moves and as many passes
_ALL = 0xFFFFFFFFFFFFFFFF
_NOT_A, _NOT_H = 0xFEFEFEFEFEFEFEFE, 0x7F7F7F7F7F7F7F7F
_DIRECTIONS = ((8, _ALL), (-8, _ALL), (1, _NOT_A), (-1, _NOT_H), (9, _NOT_A), (-9, _NOT_H), (7, _NOT_H), (-7, _NOT_A))


class Boards(NamedTuple):
    """Positions: the discs of the player to move and of the other one, u64[N] each, a bit a square."""

    own: np.ndarray
    other: np.ndarray


def opening(num: int) -> Boards:
    """Returns the position that a game begins with, N times: black, with d5 and e4, is to move."""
    black, white = _bits("d5", "e4"), _bits("d4", "e5")
    return Boards(np.full(num, black, np.uint64), np.full(num, white, np.uint64))


def _bits(*squares: str) -> int:
    return sum(1 << SQUARES.index(square) for square in squares)


def _step(discs: np.ndarray, by: int, mask: int) -> np.ndarray:
    """Returns every disc moved by one square in a direction; what leaves the board is gone."""
    moved = discs << np.uint64(by) if by > 0 else discs >> np.uint64(-by)
    return moved & np.uint64(mask)


def _lines(start: np.ndarray, other: np.ndarray, by: int, mask: int) -> np.ndarray:
    """Returns the discs of `other` that follow each other in a direction, next to `start`: at most six."""
    found = _step(start, by, mask) & other
    for _ in range(5):
        found |= _step(found, by, mask) & other
    return found


def legal(boards: Boards) -> np.ndarray:
    """Returns u64[N]: the squares where the player to move may put a disc, so that at least one is turned."""
    own, other = boards
    moves = np.zeros_like(own)
    for by, mask in _DIRECTIONS:
        moves |= _step(_lines(own, other, by, mask), by, mask)
    return moves & ~(own | other)


def play(boards: Boards, moves: np.ndarray) -> Boards:
    """Returns the positions behind legal moves, u64[N] with one bit each (0 passes), with the other player to move."""
    own, other = boards
    turned = np.zeros_like(own)
    for by, mask in _DIRECTIONS:
        line = _lines(moves, other, by, mask)
        closed = (_step(line, by, mask) & own) != 0
        turned |= np.where(closed, line, np.uint64(0))
    return Boards(other & ~turned, own | moves | turned)


def squares(boards: np.ndarray) -> np.ndarray:
    """Returns bool[N, 64] of u64[N]: which squares are set."""
    return (boards[:, None] >> np.arange(64, dtype=np.uint64)[None] & np.uint64(1)).astype(bool)


def _random_games(num: int, turns: int, rng: np.random.Generator) -> list[list[str]]:
    """Returns the words of N games, up to so many turns; every move is drawn evenly from the legal ones."""
    boards, games = opening(num), [[START] for _ in range(num)]
    for _ in range(turns):
        moves = legal(boards)
        passed = Boards(boards.other, boards.own)
        going = (moves != 0) | (legal(passed) != 0)
        if not going.any():
            break
        drawn = np.where(squares(moves), rng.random((num, 64)), -1.0).argmax(axis=1)
        for game in np.flatnonzero(going):
            games[game].append(SQUARES[drawn[game]] if moves[game] else PASS)
        chosen = np.where(moves != 0, np.uint64(1) << drawn.astype(np.uint64), np.uint64(0))
        boards = play(boards, chosen)
    return games


def games(size: int, seed: int, test: bool, turns: int | None = None) -> list[str]:
    """Returns random games; those for testing and those for training are drawn apart.

    The law of these texts is known: where n moves are legal, each has the probability 1 / n (`surprise`).

    Args:
        size: how many; the first n are the same however many are asked for.
        seed: other seeds give other games.
        test: whether they are for testing.
        turns: moves and passes of each, at most: the same games, broken off; None: whole games. Openings of few moves
            are few, so that training and testing have them in common.
    """
    blocks = [_block(number, seed, test, _LONGEST if turns is None else turns) for number in range(-(-size // _BLOCK))]
    return [text for block in blocks for text in block][:size]


@functools.lru_cache(maxsize=512)
def _block(number: int, seed: int, test: bool, turns: int) -> tuple[str, ...]:
    """Returns games that are drawn together; kept, as many runs of a table read the same."""
    name = random.Random(f"othello {seed} {number} {test}").getrandbits(64)
    return tuple(" ".join(words) for words in _random_games(_BLOCK, turns, np.random.default_rng(name)))


def replay(words: Sequence[str]) -> Boards:
    """Returns the positions behind each word of a game, T of them; the first is the opening.

    Raises:
        InputError: a word that is no legal move where it stands, or a game that does not begin with "start".
    """
    if not words or words[0] != START:
        raise InputError(f"a game begins with {START!r}, got {words[0] if words else 'nothing'!r}")
    board = opening(1)
    found = [board]
    for number, word in enumerate(words[1:], 1):
        moves = int(legal(board)[0])
        move = 1 << SQUARES.index(word) if word in SQUARES else 0
        if not (word == PASS and not moves) and not move & moves:
            may = [square for index, square in enumerate(SQUARES) if moves >> index & 1] or [PASS]
            raise InputError(f"word {number} of a game, {word!r}, is not legal: it may be {', '.join(may)}")
        board = play(board, np.array([move], np.uint64))
        found.append(board)
    return Boards(*(np.concatenate(discs) for discs in zip(*found, strict=True)))


def board_properties(words: Sequence[str]) -> np.ndarray:
    """Returns bool[T, 128]: behind each word, the squares with a disc of the player to move, then of the other one."""
    return np.concatenate([squares(discs) for discs in replay(words)], axis=1)


def surprise(words: Sequence[str]) -> np.ndarray:
    """Returns f64[T - 1]: minus the log-probability, in nats, of each word of a game but the first."""
    choices = squares(legal(replay(words)))[:-1].sum(axis=1)
    return np.log(np.maximum(choices, 1))


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns the words of games: start, pass, and the 60 squares where discs can be put."""
    middle = {"d4", "e4", "d5", "e5"}
    return (START, PASS, *(square for square in SQUARES if square not in middle))


def othello_tokenizer() -> Tokenizer:
    """Returns a tokenizer whose ids are the words of games, and one for all other words. Nothing ends a game."""
    ids = {word: index for index, word in enumerate((_UNKNOWN, *vocabulary()))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=_UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, bos_id=None, eos_id=None, pad_id=None, stop_ids=(), chat_template=None)
