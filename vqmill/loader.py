"""Batches of codes for training: shuffled, split over ranks, resumable in the middle of an epoch.

The order of an epoch is a function of (seed, epoch) alone. Rows are shuffled in two steps, so that memory stays bounded while what is
read together lies together on the disk: blocks of rows (a chunk of the coarsest level) are permuted, and the rows of each pool of
blocks are permuted once more. A global batch is cut into equal parts, one for each rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vqmill.errors import CodesError
from vqmill.spec import StoreSpec

if TYPE_CHECKING:
    from vqmill.store import LevelArray

Batch = dict[str, np.ndarray[Any, Any]]
LastBatch = Literal["keep", "drop", "pad"]
POOL_BYTES = 64 * 1024 * 1024  # raw codes held at a time; the wider, the closer to a full shuffle


class CodeBatches:
    """An iterable over batches; every `iter()` is the next epoch, or the rest of the one that `load_state_dict` named."""

    def __init__(
        self, spec: StoreSpec, arrays: Mapping[str, LevelArray], labels: LevelArray, batch_size: int, *,
        shuffle: bool, seed: int, rank: int, world_size: int, last: LastBatch, rows: np.ndarray[Any, Any] | None,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise CodesError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise CodesError(f"rank must be in 0..{world_size - 1} for world_size {world_size}, got {rank}.")
        if last not in ("keep", "drop", "pad"):
            raise CodesError(f"last must be 'keep', 'drop' or 'pad', got {last!r}.")
        if not 0 <= seed < 2**64:
            raise CodesError(f"seed must be in 0..{2**64 - 1}, got {seed}.")
        chosen = np.arange(spec.num_rows) if rows is None else np.asarray(rows)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise CodesError(
                f"rows must be a list of row numbers, got {chosen.dtype} of shape {chosen.shape}. For a mask: np.flatnonzero(mask)."
            )
        self._rows = np.sort(chosen.astype(np.int64))
        if (np.diff(self._rows) == 0).any():
            raise CodesError("rows must be distinct, got some twice.")
        if len(self._rows) and not (self._rows[0] >= 0 and self._rows[-1] < spec.num_rows):
            raise CodesError(f"rows must lie in 0..{spec.num_rows - 1}, got {self._rows[0]}..{self._rows[-1]}.")
        self._spec, self._arrays, self._labels = spec, arrays, labels
        self._block_rows = max(level.rows_per_chunk(spec.rows_per_shard) for level in spec.levels)
        self._batch_size, self._shuffle, self._seed = batch_size, shuffle, seed
        self._rank, self._world_size, self._last = rank, world_size, last
        self._selection = hashlib.sha256(self._rows.tobytes()).hexdigest()[:16]
        self._epoch = 0
        self._done = 0  # global batches of this epoch that were given out

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        whole, rest = divmod(len(self._rows), self._batch_size * self._world_size)
        if rest == 0 or self._last == "drop":
            return whole
        return whole + (self._last == "pad" or rest > self._rank * self._share(rest))

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; JSON-able. Taken after a batch was received, the next one follows on loading."""
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "rows": self._selection,
            "epoch": self._epoch,
            "global_batches": self._done,
            "global_batch_size": self._batch_size * self._world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            CodesError: taken with another seed or another global batch size (the same product of batch and world size is fine).
        """
        mine = self.state_dict()
        for name in ("seed", "shuffle", "rows", "global_batch_size"):
            if state.get(name) != mine[name]:
                raise CodesError(
                    f"the loader's state was taken with {name}={state.get(name)}, this loader has {mine[name]}."
                )
        epoch, done = state.get("epoch"), state.get("global_batches")
        if not (isinstance(epoch, int) and isinstance(done, int) and epoch >= 0 and done >= 0):
            raise CodesError(f"the loader's state is damaged: epoch={epoch!r}, global_batches={done!r}.")
        self._epoch, self._done = epoch, done

    def __iter__(self) -> Iterator[Batch]:
        global_size = self._batch_size * self._world_size
        order = self._order()
        if self._last == "drop":
            order = order[: len(order) - len(order) % global_size]
        elif self._last == "pad" and len(order) % global_size:
            order = np.concatenate([order, np.resize(order, global_size - len(order) % global_size)])
        pool_rows = max(1, POOL_BYTES // (self._spec.row_bytes * global_size)) * global_size
        first = self._done * global_size
        while first < len(order):
            # Pools are counted from the epoch's beginning, so that a resumed epoch reads what an uninterrupted one does.
            pool_start = first - first % pool_rows
            pool = order[pool_start : pool_start + pool_rows]
            read = self._read(pool)
            for start in range(first - pool_start, len(pool), global_size):
                batch = self._part_of(read, start, min(global_size, len(pool) - start))
                self._done += 1
                if batch is not None:
                    yield batch
            first = pool_start + len(pool)
        self._epoch, self._done = self._epoch + 1, 0

    def _share(self, rows: int) -> int:
        return -(-rows // self._world_size)

    def _part_of(self, read: Batch, start: int, rows: int) -> Batch | None:
        share = self._share(rows)
        first, stop = start + self._rank * share, start + min(rows, (self._rank + 1) * share)
        return {name: values[first:stop] for name, values in read.items()} if first < stop else None

    def _order(self) -> np.ndarray[Any, Any]:
        """Every row of the epoch once, int64."""
        if not self._shuffle:
            return self._rows
        generator = np.random.Generator(np.random.Philox(key=[self._seed, self._epoch]))
        block_rows = self._block_rows
        blocks = np.split(self._rows, np.flatnonzero(np.diff(self._rows // block_rows)) + 1)
        mixed = np.concatenate([blocks[int(block)] for block in generator.permutation(len(blocks))])
        pool_rows = max(block_rows, POOL_BYTES // self._spec.row_bytes)
        for start in range(0, len(mixed), pool_rows):
            generator.shuffle(mixed[start : start + pool_rows])
        return mixed

    def _read(self, rows: np.ndarray[Any, Any]) -> Batch:
        """Codes and labels of these rows, in their order; each chunk is decoded once."""
        distinct, place = np.unique(rows, return_inverse=True)
        # Stretches of neighbouring blocks are read as slices: picking rows one by one costs zarr-python many times more.
        stretches = np.split(distinct, np.flatnonzero(np.diff(distinct // self._block_rows) > 1) + 1)

        def gather(array: LevelArray) -> np.ndarray[Any, Any]:
            parts = [array[int(rows[0]) : int(rows[-1]) + 1][rows - rows[0]] for rows in stretches]
            return np.concatenate(parts)[place]

        return {"label": gather(self._labels), **{name: gather(array) for name, array in self._arrays.items()}}
