"""The order of an epoch: which row comes at which place. Pure arithmetic, nothing to store: planning 10^9 rows costs what planning ten does.

Rows are shuffled in two steps, so that memory stays bounded while what lies together on the disk is read together:

1. Blocks of neighbouring rows (a chunk of the coarsest level) are put into a pseudo-random order. The rows in that order are cut into
   `lanes` equal stretches; the epoch takes one row of each lane in turn, so place p is row p // lanes of lane p % lanes. Ranks read
   different lanes when the world size divides their number, and the same order whatever it is.
2. Each lane is read in pools of `pool_rows` rows, and the rows of a pool are permuted. The first pools have different lengths, from a half to a whole, so that
   the lanes come to their ends one after the other and the next pool of one can be read while the others are used.

A function of (seed, epoch, lanes, pool_rows) and the chosen rows; of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
ROUNDS = 8
TABLE_SIZE = 4096  # up to which a permutation is drawn at once, uniform among all


class Permutation:
    """A pseudo-random bijection on 0..n-1, computed where it is asked: a small one is a table, a large one takes no memory.

    The large ones: an alternating Feistel network on pairs (x mod a, x div a) with a * a >= n, cycle-walked into 0..n-1 (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"); the round function is the finaliser of SplitMix64, its keys are Philox(seed, stream).

    >>> sorted(Permutation(5, seed=0, stream=0)(np.arange(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, seed: int, stream: int) -> None:
        self._n = n
        self._table = self._inverse = None
        if n <= TABLE_SIZE:
            self._table = np.argsort(philox(seed, stream).random_raw(n), kind="stable")
            self._inverse = np.argsort(self._table)
        width = isqrt(max(n, 1) - 1) + 1
        self._width = np.uint64(width)
        self._height = np.uint64(-(-n // width))
        self._keys = philox(seed, stream).random_raw(ROUNDS)

    def __call__(self, places: Integers) -> Integers:
        """Which element is at each place, int64."""
        return self._table[places] if self._table is not None else self._walk(places, forward=True)

    def place_of(self, elements: Integers) -> Integers:
        """The inverse: at which place each element is, int64."""
        return self._inverse[elements] if self._inverse is not None else self._walk(elements, forward=False)

    def _walk(self, values: Integers, *, forward: bool) -> Integers:
        found = self._network(values.astype(np.uint64), forward=forward)
        while (outside := found >= self._n).any():
            found[outside] = self._network(found[outside], forward=forward)
        return found.astype(np.int64)

    def _network(self, values: np.ndarray[Any, Any], *, forward: bool) -> np.ndarray[Any, Any]:
        sides = [values % self._width, values // self._width]
        sizes = [self._width, self._height]
        for number in range(ROUNDS) if forward else reversed(range(ROUNDS)):
            this, other = number % 2, 1 - number % 2
            shift = _mix(sides[other] + self._keys[number]) % sizes[this]
            sides[this] = (sides[this] + (shift if forward else sizes[this] - shift)) % sizes[this]
        return sides[1] * self._width + sides[0]


def philox(seed: int, stream: int, counter: tuple[int, int, int, int] = (0, 0, 0, 0)) -> np.random.Philox:
    """A counter-based generator (Salmon et al. 2011); its raw draws are the same everywhere."""
    return np.random.Philox(key=np.array([seed, stream], np.uint64), counter=np.array(counter, np.uint64))


def ascending(draws: np.ndarray[Any, np.dtype[np.uint64]]) -> Integers:
    """The stable order of numbers that are hardly ever equal: when they are not, any way of sorting finds the same, and this one is fast."""
    order = np.argsort(draws)
    found = draws[order]
    return np.argsort(draws, kind="stable") if (found[1:] == found[:-1]).any() else order


def _mix(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014); uint64 arithmetic wraps."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class BlockOrder:
    """Rows in an order of their blocks: all rows of a store, or chosen ones."""

    def __init__(self, rows: int | Integers, block_rows: int, shuffle: tuple[int, int] | None) -> None:
        """Plans nothing yet when all rows are meant; looks the blocks up once when they are chosen.

        Args:
            rows: how many there are, or which (int64, ascending).
            block_rows: block i holds the rows i * block_rows and on.
            shuffle: (seed, epoch), or None to leave the blocks in their order.
        """
        self._rows, self.block_rows = rows, block_rows
        self._starts = self._begins = self._ends = np.empty(0, np.int64)
        if isinstance(rows, int):
            self.num_rows, num_blocks = rows, -(-rows // block_rows)
        else:
            self.num_rows = len(rows)
            self._starts = np.flatnonzero(np.diff(rows // block_rows, prepend=-1))
            num_blocks = len(self._starts)
        self._permutation = Permutation(num_blocks, *shuffle) if shuffle and num_blocks else None
        if self._permutation is None:
            return
        if isinstance(rows, int):
            self._last_rows = rows - (num_blocks - 1) * block_rows  # of the ragged block
            self._last_place = int(self._permutation.place_of(np.array([num_blocks - 1]))[0])
        else:
            order = self._permutation(np.arange(num_blocks))
            sizes = np.diff(self._starts, append=self.num_rows)[order]
            self._starts = self._starts[order]
            self._ends = np.cumsum(sizes)
            self._begins = self._ends - sizes

    def rows_between(self, start: int, stop: int) -> Integers:
        """The rows at the places start..stop-1 of the block order, int64."""
        places = np.arange(start, stop)
        if self._permutation is None or start == stop:
            return places if isinstance(self._rows, int) else self._rows[places]
        if not isinstance(self._rows, int):
            block = np.searchsorted(self._ends, places, side="right")
            return self._rows[self._starts[block] + places - self._begins[block]]
        # The ragged block, wherever it went, leaves a hole in an order of whole blocks: places behind it are further on.
        hole = self._last_place * self.block_rows + self._last_rows
        missing = self.block_rows - self._last_rows
        first, last = (place + missing * (place >= hole) for place in (start, stop - 1))
        blocks = self._permutation(np.arange(first // self.block_rows, last // self.block_rows + 1))
        rows = (blocks[:, None] * self.block_rows + np.arange(self.block_rows)).reshape(-1)
        begin = first - first % self.block_rows
        rows = rows[first - begin : last + 1 - begin]
        return rows[rows < self._rows]


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's order (see the top of the file).

    Attributes:
        blocks: the rows in the order of their blocks.
        lanes: how many stretches are read side by side.
        pool_rows: rows of a pool of one lane.
        shuffle: (seed, epoch), or None: lanes and pools are read as they are.
    """

    blocks: BlockOrder
    lanes: int
    pool_rows: int
    shuffle: tuple[int, int] | None

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return self.blocks.num_rows

    def lane_rows(self, lane: int) -> int:
        """Rows of a lane."""
        whole, rest = divmod(self.num_rows, self.lanes)
        return whole + (lane < rest)

    def locate(self, places: Integers) -> tuple[Integers, Integers, Integers]:
        """Where the rows at some places of the epoch are: lane, pool of the lane, and place in the pool; all int64."""
        offsets, lanes = np.divmod(places, self.lanes)
        behind = offsets - self._first_pools[lanes]
        pools = np.maximum(0, behind // self.pool_rows + 1)
        return lanes, pools, np.where(pools == 0, offsets, behind - (pools - 1) * self.pool_rows)

    def pool_bounds(self, lane: int, pool: int) -> tuple[int, int]:
        """Where a pool begins and ends, counted in its lane; equal when there is no such pool."""
        first = int(self._first_pools[lane])
        start = 0 if pool == 0 else first + (pool - 1) * self.pool_rows
        rows = self.lane_rows(lane)
        return min(start, rows), min(first + pool * self.pool_rows, rows)

    def rows_of(self, lane: int, pool: int) -> Integers:
        """The rows of a pool, int64, in the order in which they are read: block after block, ascending in each."""
        start, stop = self.pool_bounds(lane, pool)
        whole, rest = divmod(self.num_rows, self.lanes)
        first = lane * whole + min(lane, rest)
        return self.blocks.rows_between(first + start, first + stop)

    def permutation_of(self, lane: int, pool: int) -> Integers:
        """For each place of a pool, which of `rows_of` comes there; int64."""
        start, stop = self.pool_bounds(lane, pool)
        if self.shuffle is None:
            return np.arange(stop - start)
        # Raw draws are the same in every version of numpy; those of Generator.permutation are not promised to be.
        draws = philox(*self.shuffle, counter=(0, pool, lane, 1)).random_raw(stop - start)
        return ascending(draws)

    @cached_property
    def _first_pools(self) -> Integers:
        """Rows of each lane's first pool, by lane: from half a pool to a whole one."""
        lanes = np.arange(self.lanes)
        whole = np.full_like(lanes, self.pool_rows)
        return whole if self.shuffle is None else -(-whole * (self.lanes + lanes + 1) // (2 * self.lanes))
