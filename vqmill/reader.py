"""Reads the rows of a stored array: indexes of Zarr shards cached, chunks decoded straight into the caller's memory.

zarr-python reads a shard's index anew for every call, about a millisecond each; here a row costs little more than decoding its chunk.
Reading and decoding release the GIL, so that threads read side by side.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from vqmill.chunks import MISSING, ChunkLayout, crc32c, decode_chunk
from vqmill.errors import CodesError
from vqmill.places import OpenFile, Place

OPEN_SHARDS = 32  # of each array: a file descriptor and an index, of some kilobytes as our writers cut
CACHE_BYTES = 32 * 1024 * 1024  # decoded chunks of each array, for those who read row by row


class ChunkSource(Protocol):
    """Where a `RowReader` gets chunks from."""

    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read_chunk(self, chunk: int, out: np.ndarray[Any, Any]) -> None:
        """Decodes a whole chunk, rows chunk * chunk_shape[0] and on, into C-contiguous memory of chunk_shape and dtype.

        Raises:
            CodesError: it is missing or damaged.
        """
        ...


Kept = TypeVar("Kept")


class LatestUsed(Generic[Kept]):
    """The latest things that were used, by number; for any number of threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> Kept | None:
        """The thing, if it is still kept."""
        with self._lock:
            found = self._kept.get(number)
            if found is not None:
                self._kept.move_to_end(number)
            return found

    def put(self, number: int, thing: Kept) -> None:
        """Keeps it, and lets the one go that was not used for longest."""
        with self._lock:
            self._kept[number] = thing
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)


class _OpenShard:
    """An open file and its index."""

    def __init__(self, file: OpenFile, layout: ChunkLayout) -> None:
        self.file = file
        size, index_bytes = file.size, layout.index_bytes
        buffer = np.empty(index_bytes, np.uint8)
        there = size >= index_bytes and file.read_into(size - index_bytes, buffer) == index_bytes
        data = buffer.tobytes()
        if not there or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise CodesError(f"its index is damaged, or the file is cut short ({size:,} bytes)")
        self.index = np.frombuffer(data, "<u8", 2 * layout.chunks_per_shard).reshape(-1, 2)
        starts, sizes = self.index[self.index[:, 0] != MISSING].T
        if (
            (sizes > layout.max_chunk_bytes).any()
            or (starts > size).any()
            or (starts + sizes > size - index_bytes).any()
        ):
            raise CodesError("its index names places outside the file, or chunks larger than their rows can be")


class ShardedArray:
    """Chunks of an array stored as docs/format.md says."""

    def __init__(self, place: Place, shard_file: Callable[[int], str], layout: ChunkLayout) -> None:
        """Opens nothing yet.

        Args:
            place: where the store is.
            shard_file: path of a Zarr shard in the store, by number.
            layout: shape, dtype and codec of chunks.
        """
        self.chunk_shape, self.dtype = layout.chunk_shape, layout.dtype
        self._place, self._shard_file, self._layout = place, shard_file, layout
        self._shards: LatestUsed[_OpenShard] = LatestUsed(OPEN_SHARDS)
        self._thread = threading.local()

    def read_chunk(self, chunk: int, out: np.ndarray[Any, Any]) -> None:
        """See `ChunkSource`."""
        number, inner = divmod(chunk, self._layout.chunks_per_shard)
        shard = self._open(number)
        start, size = shard.index[inner].tolist()
        try:
            if start == MISSING:
                raise CodesError("it is missing")
            encoded = self._buffer()[:size]
            if shard.file.read_into(start, encoded) != size:
                raise CodesError("the file is cut short")
            decode_chunk(encoded, self._layout, out)
        except (CodesError, OSError) as error:
            raise CodesError(f"{self._shard_file(number)}, chunk {inner}: {error}") from error

    def _buffer(self) -> np.ndarray[Any, Any]:
        """This thread's memory for an encoded chunk."""
        if not hasattr(self._thread, "buffer"):
            self._thread.buffer = np.empty(self._layout.max_chunk_bytes, np.uint8)
        return self._thread.buffer

    def _open(self, number: int) -> _OpenShard:
        shard = self._shards.get(number)
        if shard is None:
            name = self._shard_file(number)
            try:
                shard = _OpenShard(self._place.open(name), self._layout)
            except OSError as error:
                raise CodesError(f"{name}: {error.strerror or error}") from error
            except CodesError as error:
                raise CodesError(f"{name}: {error}") from error
            self._shards.put(number, shard)
        return shard


class RowReader:
    """Rows of an array, from chunks. Chunks of which only a part was wanted are kept, the latest ones, up to a number of bytes."""

    def __init__(
        self, source: ChunkSource, check: Callable[[np.ndarray[Any, Any], int], None], name: str, cache_bytes: int
    ) -> None:
        """Reads nothing yet.

        Args:
            source: gives chunks.
            check: called with the wanted rows of a chunk and the first one's number; raises CodesError when a value cannot be.
            name: of the array, for errors.
            cache_bytes: decoded chunks kept; one at least.
        """
        self._source, self._check, self._name = source, check, name
        chunk_bytes = math.prod(source.chunk_shape) * source.dtype.itemsize
        self._cache: LatestUsed[np.ndarray[Any, Any]] = LatestUsed(max(1, cache_bytes // chunk_bytes))

    @property
    def chunk_rows(self) -> int:
        """Rows that are decoded together."""
        return self._source.chunk_shape[0]

    def read(self, rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Reads rows.

        Args:
            rows: int64 [n], those of a chunk together and ascending.
            out: [n, *grid] of the array's dtype, C-contiguous.

        Raises:
            CodesError: a chunk is missing or damaged, or holds values that cannot be.
        """
        if not len(rows):
            return
        chunks = rows // self.chunk_rows
        cuts = np.flatnonzero(chunks[1:] != chunks[:-1]) + 1
        for start, stop in pairwise([0, *cuts.tolist(), len(rows)]):
            chunk = int(chunks[start])
            place = out[start:stop]
            try:
                if stop - start == self.chunk_rows:
                    self._source.read_chunk(chunk, place)
                else:
                    whole, inside = self._whole(chunk), rows[start:stop] - chunk * self.chunk_rows
                    np.take(whole, inside, axis=0, out=place, mode="clip")
            except CodesError as error:
                first = chunk * self.chunk_rows
                raise CodesError(
                    f"{self._name} cannot be read in rows {first}..{first + self.chunk_rows - 1}: {error}. See: vqmill verify."
                ) from error
            self._check(place, int(rows[start]))

    def _whole(self, chunk: int) -> np.ndarray[Any, Any]:
        values = self._cache.get(chunk)
        if values is None:
            values = np.empty(self._source.chunk_shape, self._source.dtype)
            self._source.read_chunk(chunk, values)
            self._cache.put(chunk, values)
        return values
