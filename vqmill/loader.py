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
    num_threads,
    reading_threads,
    whole_number,
)

if TYPE_CHECKING:
    from vqmill.store import Codes

LastBatch = Literal["keep", "drop", "pad"]


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
        self._split = Split(batch_size, rank, world_size)
        self._last: LastBatch = last
        self._threads = num_threads(threads)
        self._shape: Shape = self._source.shape(self._split, pool_bytes)
        self._memory: PoolMemory | None = (
            None  # of the last epoch, for the next: taking it anew costs as much as filling it
        )
        self._epoch = 0
        self._place = 0  # of this epoch's order: what was given out to all ranks

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

        Raises:
            CodesError: taken with another seed or over other rows, or damaged.
        """
        self._source.check(state)
        epoch, place, shape = whole_number(state, "epoch"), whole_number(state, "place"), Shape.of(state)
        if shape != self._shape:
            self._memory = None
        self._epoch, self._place, self._shape = epoch, place, shape

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(np.empty)

    def iterate(self, allocate: Allocate) -> Iterator[Batch]:
        """The same as `iter()`, with memory for the batches from `allocate(shape, dtype)`: pinned memory, for example."""
        split, end = self._split, self._end()
        order = self._source.order(self._epoch, self._shape)
        memory, self._memory = self._memory or self._source.memory(self._shape, split.world_size), None
        with reading_threads(self._threads) as executor:
            stream = RowStream(self._source, memory, lambda turn: order, self._place, split, executor)
            while self._place < end:
                rows = min(split.global_size, end - self._place)
                batch = self._source.empty(split.share(rows), allocate)
                stream.take(batch)
                self._place += rows
                if len(batch["row"]):
                    yield batch
        self._epoch, self._place = self._epoch + 1, 0
        self._memory = memory

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
