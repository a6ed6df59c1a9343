"""Batches of codes for training: shuffled, split over ranks, resumable in the middle of an epoch.

order.py has the order of an epoch, pools.py its memory, source.py what binds them to a store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vqmill.errors import CodesError
from vqmill.pools import PoolMemory
from vqmill.source import (
    Allocate,
    Batch,
    RowSource,
    RowStream,
    Shape,
    Split,
    checked_integer,
    num_threads,
    reading_threads,
    whole_number,
)

if TYPE_CHECKING:
    from vqmill.store import Codes

LastBatch = Literal["keep", "drop", "pad"]
MOST_RESUMED_BYTES = 4 * 1024 * 1024 * 1024  # for the rest of an epoch that other ranks began, when no memory was named


class CodeBatches:
    """An iterable over batches; every `iter()` is the next epoch, or the rest of the one that was left or that `load_state_dict` named.

    Made by `Codes.batches`, which documents the options. A batch is `{"top": uint16 [B, h, w], ..., "label": int64 [B], "row": int64 [B]}`;
    its arrays are the caller's.
    """

    def __init__(
        self, codes: Codes, batch_size: int, *, levels: tuple[str, ...], shuffle: bool, seed: int, rank: int, world_size: int,
        last: LastBatch, rows: np.ndarray[Any, Any] | None, pool_bytes: int | None, threads: int | None,
    ) -> None:  # fmt: skip
        if last not in ("keep", "drop", "pad"):
            raise CodesError(f"last must be 'keep', 'drop' or 'pad', got {last!r}.")
        self._source = RowSource(codes, levels, rows, shuffle, seed)
        self._split = Split.checked(batch_size, rank, world_size)
        self._last: LastBatch = last
        self._threads = num_threads(threads)
        self._pool_bytes = None if pool_bytes is None else checked_integer("pool_bytes", pool_bytes, 1, 2**48)
        self._own_shape: Shape = self._source.shape(self._split, self._pool_bytes)
        self._shape = self._own_shape  # of this epoch; another one when it was begun by another loader
        self._memory: PoolMemory | None = None  # of the last epoch, for the next: to take it anew costs much
        self._epoch = 0
        self._place = 0  # of this epoch's order: what was given out to all ranks
        self._iterators = 0  # made so far; only the latest one may go on

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        split = self._split
        whole, rest = divmod(self._source.num_rows, split.global_size)
        if rest == 0 or self._last == "drop":
            return whole
        return whole + (self._last == "pad" or split.share(rest) > 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; JSON-able. Taken after a batch was received, the next one follows on loading."""
        state = {
            "epoch": self._epoch,
            "place": self._place,
            "lanes": self._shape.lanes,
            "pool_rows": self._shape.pool_rows,
        }
        return {**self._source.identity, **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, in the same order, whatever the batch size and the world size are now.

        The rest of that epoch is read in the lanes and pools that it was begun with, the epochs behind it in this loader's own.

        Raises:
            CodesError: taken with another seed, over other rows or of another store; or damaged; or the pools it was begun with take too
                much memory on so many ranks.
        """
        self._source.check(state)
        epoch, place, shape = whole_number(state, "epoch"), whole_number(state, "place"), Shape.of(state)
        if epoch >= 2**64 or place > self._source.num_rows:
            raise CodesError(
                f"the loader's state is damaged: place {place} of {self._source.num_rows} rows, epoch {epoch}."
            )
        needed = self._source.memory_bytes(shape, self._split.world_size)
        if shape != self._own_shape and needed > (self._pool_bytes or MOST_RESUMED_BYTES):
            raise CodesError(
                f"the epoch of this state was begun with {shape.lanes} lanes of {shape.pool_rows:,} rows; on {self._split.world_size} ranks each "
                f"needs {needed:,} bytes to go on with it. Give pool_bytes={needed}, resume on as many ranks as before, or begin the next "
                f"epoch: the same state with epoch={epoch + 1}, place=0, lanes={self._own_shape.lanes}, pool_rows={self._own_shape.pool_rows}."
            )
        self._epoch, self._place, self._shape = epoch, place, shape
        self._memory = None
        self._iterators += 1

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(np.empty)

    def iterate(self, allocate: Allocate) -> Iterator[Batch]:
        """The same as `iter()`, with memory for the batches from `allocate(shape, dtype)`: pinned memory, for example."""
        self._iterators += 1
        return self._rest(allocate, self._iterators)

    def _rest(self, allocate: Allocate, iterator: int) -> Iterator[Batch]:
        self._refuse_outdated(iterator)
        split = self._split
        if self._place and split.share(self._end() - self._place) == 0:
            self._next_epoch()  # what is left of this one is no batch, or none of ours
        place, end, shape = self._place, self._end(), self._shape
        order = self._source.order(self._epoch, shape)
        memory, self._memory = self._memory or self._source.memory(shape, split.world_size), None
        with reading_threads(self._threads) as executor:
            stream = RowStream(self._source, memory, lambda turn: order, place, split, executor)
            while place < end:
                self._refuse_outdated(iterator)
                rows = min(split.global_size, end - place)
                batch = self._source.empty(split.share(rows), allocate)
                stream.take(batch)
                place += rows
                self._place = place
                if place >= end:
                    self._next_epoch()
                if len(batch["row"]):
                    yield batch
        if place == 0:
            self._next_epoch()  # it was empty
        if shape == self._shape:
            self._memory = memory

    def _next_epoch(self) -> None:
        self._epoch, self._place, self._shape = self._epoch + 1, 0, self._own_shape

    def _refuse_outdated(self, iterator: int) -> None:
        if iterator != self._iterators:
            raise CodesError(
                "this iterator is outdated: the loader was iterated anew, or a state was loaded into it. Use the new one."
            )

    def _end(self) -> int:
        """The place behind the epoch's last batch; behind the last row when batches are padded."""
        left, size = max(0, self._source.num_rows - self._place), self._split.global_size
        match self._last:
            case "keep":
                return self._place + left
            case "drop":
                return self._place + left // size * size
            case "pad":
                return self._place + -(-left // size) * size
