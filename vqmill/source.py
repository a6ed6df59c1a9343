"""The rows of a store that take part in training: their order, the memory that they need, and one rank's stream of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vqmill.errors import CodesError
from vqmill.order import BlockOrder, EpochOrder, Integers
from vqmill.pools import EpochReader, PoolMemory, lanes_read

if TYPE_CHECKING:
    from vqmill.store import Codes

Batch = dict[str, np.ndarray[Any, Any]]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray[Any, Any]]
LANES = 16  # at least; more ranks have one each
SPARE_POOLS = 2  # for each rank, to be filled while the others are used
POOL_BLOCKS = 5  # for each row of a global batch: with blocks of equal rows, the worst case, batch means vary 1.23 times as much as i.i.d.
MAX_POOL_BYTES = 512 * 1024 * 1024  # for each rank, when nothing was asked for
ORDERED_BYTES = 24 * 1024 * 1024  # the same when rows come in their order
IN_HAND_BYTES = 12 * 1024 * 1024  # of what was asked for: chunks that are being decoded or kept, batches under way
MAX_THREADS = 8


@dataclass(frozen=True)
class Shape:
    """What decides the order of an epoch beside (seed, epoch): see `order.EpochOrder`."""

    lanes: int
    pool_rows: int

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Shape:
        """Reads it from a loader's state.

        Raises:
            CodesError: damaged.
        """
        lanes, pool_rows = whole_number(state, "lanes"), whole_number(state, "pool_rows")
        if not (lanes and pool_rows):
            raise CodesError(f"the loader's state is damaged: {lanes} lanes, pools of {pool_rows} rows.")
        return cls(lanes, pool_rows)


@dataclass(frozen=True)
class Split:
    """How a global batch is dealt out: one row to each rank in turn."""

    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise CodesError(f"batch_size must be at least 1, got {self.batch_size}.")
        if not 0 <= self.rank < self.world_size:
            raise CodesError(
                f"rank must be in 0..{self.world_size - 1} for world_size {self.world_size}, got {self.rank}."
            )

    @property
    def global_size(self) -> int:
        """Rows of a batch over all ranks."""
        return self.batch_size * self.world_size

    def share(self, rows: int) -> int:
        """How many of so many rows are this rank's."""
        return max(0, -(-(rows - self.rank) // self.world_size))


class RowSource:
    """The rows of a store that take part, in an order for each epoch."""

    def __init__(
        self, codes: Codes, levels: tuple[str, ...], rows: np.ndarray[Any, Any] | None, shuffle: bool, seed: int
    ) -> None:
        if not 0 <= seed < 2**64:
            raise CodesError(f"seed must be in 0..{2**64 - 1}, got {seed}.")
        self._codes, self._levels, self._shuffle, self._seed = codes, levels, shuffle, seed
        self._rows = len(codes) if rows is None else _checked_rows(rows, len(codes))
        self.num_rows = self._rows if isinstance(self._rows, int) else len(self._rows)
        chosen = (
            f"all {self._rows}"
            if isinstance(self._rows, int)
            else hashlib.sha256(self._rows.tobytes()).hexdigest()[:16]
        )
        self.identity = {"seed": seed, "shuffle": shuffle, "rows": chosen}
        spec = codes.spec
        self._block_rows = max(level.rows_per_chunk(spec.rows_per_shard) for level in spec.levels)
        self._arrays = {
            "label": ((), np.dtype(np.int64)),
            **{name: (spec.level(name).grid, spec.level(name).dtype) for name in levels},
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuses a state of another order.

        Raises:
            CodesError: naming what differs.
        """
        for name, mine in self.identity.items():
            if state.get(name) != mine:
                raise CodesError(
                    f"the loader's state was taken with {name}={state.get(name)!r}, this loader has {mine!r}."
                )

    def shape(self, split: Split, pool_bytes: int | None) -> Shape:
        """Lanes and pools, by the number of ranks and the memory that each may use.

        Raises:
            CodesError: not even one row fits.
        """
        ranks, row_bytes = split.world_size, self._codes.spec.row_bytes + 3 * 8  # label, number and order
        fewest = ranks * (1 + SPARE_POOLS)
        if pool_bytes is not None:
            rows = ranks * ((pool_bytes - min(pool_bytes // 4, IN_HAND_BYTES)) // row_bytes)
            if rows < fewest:
                raise CodesError(
                    f"pool_bytes={pool_bytes} is too little: at least {fewest // ranks} rows of {row_bytes:,} bytes are needed."
                )
        elif self._shuffle:
            rows = max(
                fewest, min(POOL_BLOCKS * self._block_rows * split.global_size, ranks * (MAX_POOL_BYTES // row_bytes))
            )
        else:
            rows = max(fewest, ranks * (ORDERED_BYTES // row_bytes))
        if not self._shuffle:
            return Shape(ranks, rows // fewest)
        if self.num_rows <= rows:  # all at once: one pool for each rank
            return Shape(ranks, max(1, -(-self.num_rows // ranks) * ranks))
        lanes = ranks * max(1, min(-(-LANES // ranks), rows // ranks - SPARE_POOLS))
        return Shape(lanes, rows // (lanes + ranks * SPARE_POOLS))

    def order(self, epoch: int, shape: Shape) -> EpochOrder:
        """The order of an epoch."""
        shuffle = (self._seed, epoch) if self._shuffle else None
        return EpochOrder(BlockOrder(self._rows, self._block_rows, shuffle), shape.lanes, shape.pool_rows, shuffle)

    def memory(self, shape: Shape, world_size: int) -> PoolMemory:
        """Room for one rank's pools."""
        slot_rows = min(shape.pool_rows, -(-self.num_rows // shape.lanes))
        arrays = {"row": ((), np.dtype(np.int64)), **self._arrays}
        return PoolMemory.allocate(lanes_read(shape.lanes, world_size) + SPARE_POOLS, slot_rows, arrays)

    def reader(self, order: EpochOrder, memory: PoolMemory, executor: Executor, start: int, stride: int) -> EpochReader:
        """One rank's rows of an epoch."""
        return EpochReader(order, self._codes.row_readers(self._levels), memory, executor, start, stride)

    def empty(self, rows: int, allocate: Allocate) -> Batch:
        """Memory for a batch."""
        arrays = {**self._arrays, "row": ((), np.dtype(np.int64))}
        return {name: allocate((rows, *grid), dtype) for name, (grid, dtype) in arrays.items()}


class RowStream:
    """One rank's rows without end: when an order is at its end, `order_of(turn)` gives the next one."""

    def __init__(
        self,
        source: RowSource,
        memory: PoolMemory,
        order_of: Callable[[int], EpochOrder],
        place: int,
        split: Split,
        executor: Executor,
    ) -> None:
        """Begins at a place of all ranks together, counted over all turns; `memory` is from `RowSource.memory`, and nobody else's."""
        self._source, self._order_of, self._executor = source, order_of, executor
        self._memory = memory
        self._place, self._stride = place + split.rank, split.world_size
        self._reader: EpochReader | None = None

    def take(self, out: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Fills arrays [n, ...] by name with the next n rows."""
        wanted, done = len(out["row"]), 0
        while done < wanted:
            turn, place = divmod(self._place, self._source.num_rows)
            if self._reader is None:
                self._reader = self._source.reader(
                    self._order_of(turn), self._memory, self._executor, place, self._stride
                )
            count = min(wanted - done, -(-(self._source.num_rows - place) // self._stride))
            self._reader.take({name: array[done : done + count] for name, array in out.items()})
            done += count
            self._place += count * self._stride
            if self._place // self._source.num_rows != turn:
                self._reader.drain()
                self._reader = None


def num_threads(threads: int | None) -> int:
    """How many threads read: as asked, else one for each core that this process may use, up to MAX_THREADS.

    Raises:
        CodesError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise CodesError(f"threads must be at least 1, got {threads}.")
    return threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))


@contextmanager
def reading_threads(number: int) -> Generator[Executor]:
    """Threads that end, with what they have not begun, when the block is left, however it is left."""
    executor = ThreadPoolExecutor(number, thread_name_prefix="vqmill-read")
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _checked_rows(rows: np.ndarray[Any, Any], num_rows: int) -> Integers:
    chosen = np.asarray(rows)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise CodesError(
            f"rows must be a list of row numbers, got {chosen.dtype} of shape {chosen.shape}. For a mask: np.flatnonzero(mask)."
        )
    chosen = np.sort(chosen.astype(np.int64))
    if (np.diff(chosen) == 0).any():
        raise CodesError("rows must be distinct, got some twice.")
    if len(chosen) and not (chosen[0] >= 0 and chosen[-1] < num_rows):
        raise CodesError(f"rows must lie in 0..{num_rows - 1}, got {chosen[0]}..{chosen[-1]}.")
    return chosen


def whole_number(state: Mapping[str, Any], name: str) -> int:
    """A number of a loader's state.

    Raises:
        CodesError: it is not there, or is none.
    """
    value = cast("object", state.get(name))
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CodesError(f"the loader's state is damaged: {name}={value!r}.")
    return value
