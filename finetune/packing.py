"""From rows of tokens to the batches of a run: a pure function of (rows, settings, seed, step).

Each epoch takes every row once, in an order drawn from (seed, epoch). Several rows share a packed row where they fit
(`segment_attend` keeps them apart), or each is padded to the next of a few lengths. Both plans depend on the rows'
lengths alone, so that every epoch has the same number of updates, and the batch of any update can be made without those
before it: the position in the data is the number of updates made.

Rows that have a source (what an encoder reads) are never packed; each is padded on both sides.

Axis letters: A micro-batches of an update, B rows, T tokens of a row, S tokens of a source.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from finetune.rows import Rows
from finetune.state import Batch, Source
from models.errors import InputError

_SHORTEST = 16  # the least length that rows are padded to


class _Epoch(NamedTuple):
    """The rows in the order that the plan's places count in, and each update's ((T, S), numbers of its bins)."""

    number: int
    order: np.ndarray
    updates: list[tuple[tuple[int, int], np.ndarray]]


def pack(lengths: np.ndarray, length: int) -> list[list[int]]:
    """Puts rows into as few bins as best fit decreasing finds: each row goes where it leaves the least space.

    Args:
        lengths: i64[R], falling, each from 1 to `length`.
        length: of a bin.

    Returns:
        The places in `lengths` of each bin's rows.
    """
    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(length + 1)]  # numbers of the bins by free space
    spaces = 0  # bit s: some bin has s free
    for place, size in enumerate(lengths.tolist()):
        fitting = spaces >> size
        space = size + (fitting & -fitting).bit_length() - 1 if fitting else length
        if space == length:
            bins.append([])
            number = len(bins) - 1
        else:
            number = with_space[space].pop()
            spaces &= ~(0 if with_space[space] else 1 << space)
        bins[number].append(place)
        with_space[space - size].append(number)
        spaces |= 1 << (space - size)
    return bins


def padded(lengths: np.ndarray, length: int) -> np.ndarray:
    """Returns the length that each row is padded to: the next power of two from 16 up, or `length` if that is less."""
    powers = 1 << np.ceil(np.log2(np.maximum(lengths, _SHORTEST))).astype(np.int64)
    return np.minimum(powers, length)


class Batches:
    """The batches of a run: `batches(step)` is that of the update with `step` updates before it, as numpy arrays.

    `len(batches)` is the number of updates of an epoch. The last batch of an epoch (without packing: the last of each
    length) is filled up with empty rows.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        length: int,
        accumulate: int = 1,
        packing: bool = True,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Plans the epochs.

        Args:
            rows: none longer than `length`.
            batch_size: rows of an update, over all micro-batches and processes.
            length: tokens of a packed row; without packing the greatest length.
            accumulate: micro-batches of an update.
            packing: whether rows share packed rows; if not, each is padded.
            seed: of the order.
            process_index: which process this is.
            process_count: processes that share the batch: each gets the same rows of every micro-batch.

        Raises:
            InputError: no rows, a row that is too long, rows with sources that are to be packed, a batch size that
                cannot be shared out, or a negative seed.
        """
        if not len(rows):
            raise InputError("no rows to make batches of")
        if rows.lengths.max() > length:
            raise InputError(f"a row has {rows.lengths.max()} tokens, more than length, {length}")
        if batch_size < 1 or accumulate < 1 or batch_size % (accumulate * process_count):
            raise InputError(
                f"batch_size {batch_size} must be a multiple of accumulate {accumulate} times the number of processes "
                f"{process_count}, as every process takes part in every micro-batch"
            )
        if packing and len(rows.sources):
            raise InputError("rows that an encoder reads a source of cannot share a packed row: set packing to false")
        if seed < 0:
            raise InputError(f"seed must not be negative, got {seed}")
        self._rows, self._seed, self._size = rows, seed, batch_size
        self._shape, self._process = (accumulate, process_count, -1), process_index
        self._settings = (batch_size, length, packing, seed)
        self._span = int(rows.source_lengths.max()) + 1  # keys count T in these, and S beside it
        self._keys = rows.lengths if packing else self._padded(rows, length)  # rows of one key are exchangeable
        falling = -np.sort(-self._keys)
        self._bins = pack(falling, length) if packing else [[place] for place in range(len(rows))]
        widths = np.full(len(self._bins), length) if packing else falling
        each = [(divmod(int(width), self._span), widths == width) for width in np.unique(widths)]
        self._groups = [(shape, np.flatnonzero(chosen)) for shape, chosen in each]
        self._count = sum(-(-len(group) // batch_size) for _, group in self._groups)
        self._epoch = self._plan(0)

    def __len__(self) -> int:
        return self._count

    def __call__(self, step: int) -> Batch:
        """Returns this process's part of the batch of an update: tokens i32[A, B, T] and so on."""
        number, index = divmod(step, self._count)
        if number != self._epoch.number:
            self._epoch = self._plan(number)
        widths, bins = self._epoch.updates[index]
        bins = np.pad(bins, (0, self._size - len(bins)), constant_values=-1)
        return self._fill(bins.reshape(self._shape)[:, self._process], *widths)

    @property
    def fingerprint(self) -> str:
        """What decides which rows each update sees: SHA-256 of the rows, batch size, length, packing and seed.

        Micro-batches and processes only share the same rows out, so a run may go on with other numbers of them.
        """
        digest = hashlib.sha256(repr(self._settings).encode())
        rows = self._rows
        sources = (rows.sources, rows.source_starts) if len(rows.sources) else ()
        for values in (rows.tokens, rows.targets, rows.starts, *sources):
            digest.update(values.tobytes())
        return digest.hexdigest()

    def _plan(self, number: int) -> _Epoch:
        rng = np.random.default_rng((self._seed, number))
        order = rng.permutation(len(self._rows))
        order = order[np.argsort(-self._keys[order], kind="stable")]
        updates = []
        for width, group in self._groups:
            shuffled = rng.permutation(group)
            updates += [(width, shuffled[start : start + self._size]) for start in range(0, len(group), self._size)]
        return _Epoch(number, order, [updates[index] for index in rng.permutation(len(updates))])

    def _padded(self, rows: Rows, length: int) -> np.ndarray:
        """Returns T * span + S of each row, the lengths that it is padded to."""
        widths = padded(rows.lengths, length)
        return widths * self._span + (padded(rows.source_lengths, self._span - 1) if self._span > 1 else 0)

    def _fill(self, bins: np.ndarray, width: int, source_width: int) -> Batch:
        """Returns the batch of these bins, [A, B]; -1 is an empty row."""
        tokens, segments, positions = (np.zeros((*bins.shape, width), np.int32) for _ in range(3))
        targets = np.zeros((*bins.shape, width), bool)
        for where in zip(*np.nonzero(bins >= 0), strict=True):
            end = 0
            for segment, place in enumerate(self._bins[bins[where]], 1):
                row = self._epoch.order[place]
                source = slice(self._rows.starts[row], self._rows.starts[row + 1])
                target = slice(end, end + source.stop - source.start)
                tokens[where][target] = self._rows.tokens[source]
                targets[where][target] = self._rows.targets[source]
                segments[where][target] = segment
                positions[where][target] = np.arange(target.stop - end)
                end = target.stop
        source = self._sources(bins, source_width) if source_width else None
        return Batch(tokens, targets, segments, positions, source)

    def _sources(self, bins: np.ndarray, width: int) -> Source:
        """Returns what an encoder reads of these bins, each of which has one row."""
        tokens, lengths = np.zeros((*bins.shape, width), np.int32), np.zeros(bins.shape, np.int32)
        for where in zip(*np.nonzero(bins >= 0), strict=True):
            row = self._epoch.order[self._bins[bins[where]][0]]
            lengths[where] = self._rows.source_lengths[row]
            first = self._rows.source_starts[row]
            tokens[where][: lengths[where]] = self._rows.sources[first : first + lengths[where]]
        return Source(tokens, lengths)
