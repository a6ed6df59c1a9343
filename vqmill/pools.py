"""Holds the pools of an epoch in memory: threads fill them ahead of their use, `take` gathers rows out of them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np

from vqmill.order import EpochOrder, Integers
from vqmill.reader import RowReader

PIECE_BYTES = 2 * 1024 * 1024  # what a thread decodes at a time, so that all of them help with the first pools
LOCATED_PLACES = 4096


@dataclass(frozen=True)
class PoolMemory:
    """Room for some pools.

    Attributes:
        values: by array name, [slots * slot_rows, *grid]; `row` holds the rows' numbers.
        order: int64 [slots, slot_rows]: for each place of a pool, the index in `values`.
    """

    values: Mapping[str, np.ndarray[Any, Any]]
    order: Integers

    @classmethod
    def allocate(
        cls, slots: int, slot_rows: int, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    ) -> PoolMemory:
        """Takes the memory; the system gives it page by page as it is filled.

        Args:
            slots: how many pools.
            slot_rows: of how many rows each.
            arrays: by name, shape of a row and dtype.
        """
        values = {name: np.empty((slots * slot_rows, *grid), dtype) for name, (grid, dtype) in arrays.items()}
        return cls(values, np.empty((slots, slot_rows), np.int64))


def lanes_read(lanes: int, stride: int) -> int:
    """How many lanes a rank reads, of `stride` ranks."""
    return lanes // gcd(lanes, stride)


class EpochReader:
    """The rows of an epoch that are one rank's: those at the places start, start + stride, start + 2 * stride, ... of its order."""

    def __init__(
        self, order: EpochOrder, readers: Mapping[str, RowReader], memory: PoolMemory, executor: Executor, start: int, stride: int,
    ) -> None:  # fmt: skip
        """Begins to fill the first pools.

        Args:
            order: of the epoch.
            readers: by array name.
            memory: room for `lanes_read` pools at least; with more, pools are read ahead. Nobody else uses it.
            executor: threads that read.
            start: the first place.
            stride: number of ranks.
        """
        self._order, self._readers, self._memory, self._executor = order, readers, memory, executor
        self._place, self._stride = start, stride
        self._located = (np.empty(0, np.int64),) * 4  # places, and what `EpochOrder.locate` says of them
        slots, self._slot_rows = memory.order.shape
        self._free = list(range(slots))
        self._slots: dict[int, int] = {}  # of the pools in memory, by pool * lanes + lane
        self._table = (np.empty(0, np.int64),) * 2  # the same, sorted
        self._filling: deque[tuple[int, list[Future[None]]]] = (
            deque()
        )  # (first place of ours, what is still being read)
        self._in_use: list[tuple[int, int]] = []  # a heap of (last place of ours, pool * lanes + lane)
        self._upcoming: list[
            tuple[int, int, int]
        ] = []  # a heap of (first place of ours, lane, pool), one for each lane
        for lane in range(order.lanes):
            self._announce(lane, max(0, -(-(start - lane) // order.lanes)))
        self._fill_ahead()

    def take(self, out: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Gives the next n rows, of which there must be as many.

        Args:
            out: by array name and for `row`, arrays [n, *grid] to be filled.

        Raises:
            CodesError: something could not be read.
        """
        places, lanes, pools, inside = self._locate(len(out["row"]))
        done = 0
        while done < len(places):
            self._fill_ahead()
            unready = self._upcoming[0][0] if self._upcoming else self._order.num_rows
            stop = int(places.searchsorted(unready))
            assert stop > done, "no memory for the next pool"
            self._wait_for(int(places[stop - 1]))
            keys, slots = self._table
            slots = slots[keys.searchsorted(pools[done:stop] * self._order.lanes + lanes[done:stop])]
            index = self._memory.order[slots, inside[done:stop]]
            for name, array in out.items():
                self._memory.values[name].take(index, axis=0, out=array[done:stop], mode="clip")
            done = stop
            self._place = int(places[stop - 1]) + self._stride
        self._fill_ahead()

    def _locate(self, count: int) -> tuple[Integers, Integers, Integers, Integers]:
        """The next places, and where their rows are; computed for many at a time, which costs little more than for a few."""
        done = (self._place - self._located[0][0]) // self._stride if len(self._located[0]) else 0
        if done + count > len(self._located[0]):
            stop = min(self._order.num_rows, self._place + max(count, LOCATED_PLACES) * self._stride)
            places = np.arange(self._place, stop, self._stride)
            self._located, done = (places, *self._order.locate(places)), 0
        places, lanes, pools, inside = (part[done : done + count] for part in self._located)
        return places, lanes, pools, inside

    def _wait_for(self, place: int) -> None:
        """Waits until all pools that begin up to a place are filled."""
        while self._filling and self._filling[0][0] <= place:
            for piece in self._filling.popleft()[1]:
                piece.result()

    def drain(self) -> None:
        """Waits for what is still being read, so that the memory can be used again."""
        for _, pieces in self._filling:
            wait(pieces)

    def _announce(self, lane: int, offset: int) -> None:
        """Notes the next pool of a lane that holds a row of ours at or behind an offset; others are never read."""
        first, step = self._ours(lane)
        offset += (first - offset) % step
        if first >= 0 and offset < self._order.lane_rows(lane):
            place = offset * self._order.lanes + lane
            pool = int(self._order.locate(np.array([place]))[1][0])
            heapq.heappush(self._upcoming, (place, lane, pool))

    def _ours(self, lane: int) -> tuple[int, int]:
        """Which offsets of a lane are at places of this rank: the first, and the step to the next; the first is -1 when none is."""
        common = gcd(self._order.lanes, self._stride)
        step, missing = self._stride // common, (self._place - lane) % self._stride
        if missing % common:
            return -1, step
        return missing // common * pow(self._order.lanes // common, -1, step) % step, step

    def _fill_ahead(self) -> None:
        """Frees what lies behind the next place, and begins to fill as many of the next pools as there is room for."""
        lanes, before = self._order.lanes, len(self._filling)
        while self._in_use and self._in_use[0][0] < self._place:
            self._free.append(self._slots.pop(heapq.heappop(self._in_use)[1]))
        while self._free and self._upcoming:
            first_place, lane, pool = heapq.heappop(self._upcoming)
            slot, key = self._free.pop(), pool * lanes + lane
            stop = self._order.pool_bounds(lane, pool)[1]
            first, step = self._ours(lane)
            last = stop - 1 - (stop - 1 - first) % step
            self._slots[key] = slot
            heapq.heappush(self._in_use, (last * lanes + lane, key))
            self._filling.append((first_place, self._fill(lane, pool, slot)))
            self._announce(lane, stop)
        if len(self._filling) > before:
            table = np.array(sorted(self._slots.items()))
            self._table = (table[:, 0].copy(), table[:, 1].copy())

    def _fill(self, lane: int, pool: int, slot: int) -> list[Future[None]]:
        rows = self._order.rows_of(lane, pool)
        first = slot * self._slot_rows
        self._memory.values["row"][first : first + len(rows)] = rows
        tasks = [self._executor.submit(self._permute, lane, pool, slot)]
        for start, stop in self._pieces(rows):
            tasks.append(self._executor.submit(self._read, rows[start:stop], first + start))
        return tasks

    def _permute(self, lane: int, pool: int, slot: int) -> None:
        order = self._order.permutation_of(lane, pool)
        self._memory.order[slot, : len(order)] = order + slot * self._slot_rows

    def _pieces(self, rows: Integers) -> list[tuple[int, int]]:
        """Cuts rows between blocks, into pieces of about PIECE_BYTES."""
        row_bytes = sum(array[:1].nbytes for array in self._memory.values.values())
        ends = np.append(np.flatnonzero(np.diff(rows // self._order.blocks.block_rows)) + 1, len(rows))
        wanted = np.arange(0, len(rows), max(1, PIECE_BYTES // row_bytes))
        cuts = np.unique(np.append(ends[np.searchsorted(ends, wanted[1:])], [0, len(rows)]))
        return list(pairwise(cuts.tolist()))

    def _read(self, rows: Integers, first: int) -> None:
        for name, reader in self._readers.items():
            reader.read(rows, self._memory.values[name][first : first + len(rows)])
