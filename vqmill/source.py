"""The rows of a store that take part in training: their order, the memory that they need, and one rank's stream of them."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vqmill.errors import CodesError
from vqmill.order import BlockOrder, EpochOrder, Integers
from vqmill.pools import EpochReader, PoolMemory, lanes_read
from vqmill.spec import MAX_ROWS

if TYPE_CHECKING:
    from vqmill.store import Codes

Batch = dict[str, np.ndarray[Any, Any]]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray[Any, Any]]
LANES = 32  # at least; more ranks have one each
SPARE_POOLS = 2  # for each rank, to be filled while the others are used
POOL_BLOCKS = 5  # for each row of a global batch: with blocks of equal rows, the worst case, batch means vary 1.23 times as much as i.i.d.
MAX_POOL_BYTES = 512 * 1024 * 1024  # for each rank, when nothing was asked for
ORDERED_BYTES = 24 * 1024 * 1024  # the same when rows come in their order
IN_HAND_BYTES = 12 * 1024 * 1024  # of what was asked for: chunks that are being decoded or kept, batches under way
MAX_RANKS = 2**20
ROW_BYTES = 64  # of each row beside its codes: label, number, order, and what is needed to compute these
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
        if not (1 <= lanes <= MAX_RANKS and 1 <= pool_rows <= MAX_ROWS):
            raise CodesError(f"the loader's state is damaged: {lanes} lanes, pools of {pool_rows} rows.")
        return cls(lanes, pool_rows)


@dataclass(frozen=True)
class Split:
    """How a global batch is dealt out: one row to each rank in turn."""

    batch_size: int
    rank: int
    world_size: int

    @classmethod
    def checked(cls, batch_size: int, rank: int, world_size: int) -> Split:
        """As users give them: any kind of integer.

        Raises:
            CodesError: out of range.
        """
        ranks = checked_integer("world_size", world_size, 1, MAX_RANKS)
        return cls(
            checked_integer("batch_size", batch_size, 1, 2**32), checked_integer("rank", rank, 0, ranks - 1), ranks
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
        """Looks at the chosen rows, at nothing of the store.

        Raises:
            CodesError: an option out of its range.
        """
        self._shuffle, self._seed = _checked_flag(shuffle), checked_integer("seed", seed, 0, 2**64 - 1)
        self._codes, self._levels = codes, levels
        if rows is None:
            self._rows: int | Integers = len(codes)
            self.num_rows, chosen = len(codes), f"all {len(codes)}"
        else:
            some = _checked_rows(np.asarray(rows), len(codes))
            self.num_rows, chosen = len(some), hashlib.sha256(some.tobytes()).hexdigest()[:16]
            self._rows = some
            if len(some) and some[-1] == len(some) - 1:  # the first rows: all that a store had before it grew
                self._rows, chosen = len(some), f"all {len(some)}"
        self._block_rows = max(codes[level].chunk_rows for level in codes.levels)
        spec = codes.spec
        self.identity: dict[str, Any] = {
            "tokenizer": spec.tokenizer.get("fingerprint"),
            "block_rows": self._block_rows,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "rows": chosen,
        }
        self._arrays = {
            "label": ((), np.dtype(np.int64)),
            **{name: (spec.level(name).grid, spec.level(name).dtype) for name in levels},
        }
        self._row_bytes = sum(spec.level(name).row_bytes for name in levels) + ROW_BYTES

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuses a state of another order.

        Raises:
            CodesError: naming what differs.
        """
        for name, mine in self.identity.items():
            if state.get(name) != mine:
                grown = " If the store has grown since, give the rows it had: rows=range(N)." if name == "rows" else ""
                raise CodesError(
                    f"the loader's state was taken with {name}={state.get(name)!r}, this loader has {mine!r}.{grown}"
                )

    def shape(self, split: Split, pool_bytes: int | None, share: Fraction = Fraction(1)) -> Shape:
        """Lanes and pools, by the number of ranks and the memory that each may use.

        Args:
            split: the ranks and their batches.
            pool_bytes: memory of a rank; None for what the shuffle wants.
            share: of the batches, when rows of other stores are in them.

        Raises:
            CodesError: too few rows fit.
        """
        ranks = split.world_size
        lanes = ranks * -(-LANES // ranks) if self._shuffle else ranks
        pools = lanes // ranks + SPARE_POOLS  # of a rank
        if pool_bytes is not None:
            usable = pool_bytes - min(pool_bytes // 4, IN_HAND_BYTES)
        elif self._shuffle:
            usable = int(MAX_POOL_BYTES * share)
        else:
            usable = int(ORDERED_BYTES * share)
        rows = usable // self._row_bytes  # of a rank
        if pool_bytes is None and self._shuffle:
            wanted = int(POOL_BLOCKS * self._block_rows * split.global_size * share)
            rows = min(rows, max(1, wanted // lanes) * pools)
        if self._shuffle and self.num_rows <= rows * ranks:  # all at once: one pool for each rank
            return Shape(ranks, max(1, 2 * -(-self.num_rows // ranks)))
        if pool_bytes is None:
            rows = max(rows, pools)
        fewest = 1 + SPARE_POOLS
        if rows < fewest:
            raise CodesError(
                f"pool_bytes={pool_bytes} is too little: at least {fewest * self._row_bytes * 4 // 3 + 3:,} are needed for {fewest} rows"
                f"{'' if share == 1 else f', and this is the share of one store ({float(share):.3g})'}."
            )
        if rows < pools:  # lanes of one rank share a pool's place
            lanes, pools = ranks * (rows - SPARE_POOLS), rows
        return Shape(lanes, rows // pools)

    def memory_bytes(self, shape: Shape, world_size: int) -> int:
        """What one rank's pools take."""
        return self._slots(shape, world_size) * self._slot_rows(shape) * self._row_bytes

    def order(self, epoch: int, shape: Shape) -> EpochOrder:
        """The order of an epoch."""
        shuffle = (self._seed, epoch) if self._shuffle else None
        return EpochOrder(BlockOrder(self._rows, self._block_rows, shuffle), shape.lanes, shape.pool_rows, shuffle)

    def memory(self, shape: Shape, world_size: int) -> PoolMemory:
        """Room for one rank's pools."""
        arrays = {"row": ((), np.dtype(np.int64)), **self._arrays}
        return PoolMemory.allocate(self._slots(shape, world_size), self._slot_rows(shape), arrays)

    def _slots(self, shape: Shape, world_size: int) -> int:
        one_each = shape.pool_rows >= 2 * -(-self.num_rows // shape.lanes)  # half a pool, the first one, is a lane
        return lanes_read(shape.lanes, world_size) + (0 if one_each else SPARE_POOLS)

    def _slot_rows(self, shape: Shape) -> int:
        return min(shape.pool_rows, -(-self.num_rows // shape.lanes))

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
    if threads is not None:
        return checked_integer("threads", threads, 1, 1024)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, cores)


def checked_integer(name: str, value: Any, low: int, high: int) -> int:
    """An option that is a whole number, numpy's kinds among them.

    Raises:
        CodesError: it is none, or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise CodesError(f"{name} must be a whole number, got {value!r}.") from error
    if isinstance(value, (bool, np.bool_)) or not low <= number <= high:
        raise CodesError(f"{name} must be in {low}..{high}, got {value}.")
    return number


def _checked_flag(shuffle: object) -> bool:
    if isinstance(shuffle, bool) or type(shuffle) is np.bool_:
        return bool(shuffle)
    raise CodesError(f"shuffle must be True or False, got {shuffle!r}.")


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
