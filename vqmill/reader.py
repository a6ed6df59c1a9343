"""Reads the rows of a stored array: indexes of Zarr shards cached, chunks decoded straight into the caller's memory.

zarr-python reads a shard's index anew for every call, about a millisecond each; here a row costs little more than decoding its chunk.
Reading and decoding release the GIL, so that threads read side by side.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from vqmill import native
from vqmill.chunks import MISSING, ChunkLayout, crc32c, decode_chunk
from vqmill.errors import CodesError
from vqmill.places import Bytes, OpenFile, Readable, RemoteFile

OPEN_SHARDS = 32  # of each array: a file descriptor and an index, of some kilobytes as our writers cut
FETCHED_CHUNKS = 64  # of a store in a bucket: encoded chunks in memory at a time, of each reader
FETCHERS = 8  # Zarr shards asked at a time
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

    def read_chunks(self, chunks: Sequence[int], out: np.ndarray[Any, Any], below: int) -> int:
        """Decodes many whole chunks at once, where that can be done.

        Args:
            chunks: their numbers.
            out: C-contiguous memory of dtype for all of them, one behind the other.
            below: what every value must be less than; 0 when any may be.

        Returns:
            How many chunks, from the first one on, are decoded and right: of the next one, if there is one, `read_chunk` says what is wrong.
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

    def __init__(self, place: Readable, shard_file: Callable[[int], str], layout: ChunkLayout) -> None:
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
        if self._read_compiled([chunk], out, 0, self._layout.raw_bytes):
            return
        number, inner = divmod(chunk, self._layout.chunks_per_shard)
        shard = self._open(number)
        start, size = shard.index[inner].tolist()
        try:
            if start == MISSING:
                raise CodesError("it is missing")
            encoded = self._scratch().encoded[:size]
            if shard.file.read_into(start, encoded) != size:
                raise CodesError("the file is cut short")
            decode_chunk(encoded, self._layout, out)
        except (CodesError, OSError) as error:
            raise CodesError(f"{self._shard_file(number)}, chunk {inner}: {error}") from error

    def read_chunks(self, chunks: Sequence[int], out: np.ndarray[Any, Any], below: int) -> int:
        """See `ChunkSource`."""
        return self._read_compiled(chunks, out, below, 0) or self._read_remote(chunks, out, below)

    def _read_compiled(self, chunks: Sequence[int], out: np.ndarray[Any, Any], below: int, else_decoded: int) -> int:
        """The same; says how many bytes Python will decode if this gives 0, which is what compiled code is loaded for."""
        layout = self._layout
        table: list[tuple[int, int, int]] = []
        shards: list[_OpenShard] = []  # which must stay open
        for number, inner in (divmod(chunk, layout.chunks_per_shard) for chunk in chunks):
            try:
                shard = self._open(number)
            except CodesError:
                break  # `read_chunk` will say it
            start, size = shard.index[inner].tolist()
            if shard.file.descriptor is None or start == MISSING:
                break
            shards.append(shard)
            table.append((shard.file.descriptor, start, size))
        read = native.PROCESS.read_chunks(else_decoded) if table else None
        if read is None:
            return 0
        assert out.flags.c_contiguous
        memory = out.reshape(len(chunks), -1).view(np.uint8)
        places = np.array(table, np.int64)
        return read(places, memory, layout.dtype.itemsize, layout.compressor == "blosc", below, *self._scratch())

    def _read_remote(self, chunks: Sequence[int], out: np.ndarray[Any, Any], below: int) -> int:
        """The same for files each read of which is a request: many chunks are asked for at once."""
        rows, done = self.chunk_shape[0], 0
        if len(chunks) < 2 or not self._is_remote(chunks[0]):
            return 0
        for first in range(0, len(chunks), FETCHED_CHUNKS):
            found = self._fetch(chunks[first : first + FETCHED_CHUNKS])
            for chunk in chunks[first : first + FETCHED_CHUNKS]:
                values = out[done * rows : (done + 1) * rows]
                try:
                    decode_chunk(found[chunk], self._layout, values)
                except (KeyError, CodesError):
                    return done  # `read_chunk` will say it
                if below and int(values.max()) >= below:
                    return done
                done += 1
        return done

    def _is_remote(self, chunk: int) -> bool:
        try:
            return isinstance(self._open(chunk // self._layout.chunks_per_shard).file, RemoteFile)
        except CodesError:
            return False  # `read_chunk` will say it

    def _fetch(self, chunks: Sequence[int]) -> dict[int, Bytes]:
        """Encoded chunks by their number, as far as they can be had; Zarr shards side by side."""
        per_shard = self._layout.chunks_per_shard
        numbers = sorted({chunk // per_shard for chunk in chunks})

        def fetch(number: int) -> dict[int, Bytes]:
            try:
                shard = self._open(number)
                there = [chunk for chunk in chunks if chunk // per_shard == number]
                there = [chunk for chunk in there if int(shard.index[chunk % per_shard, 0]) != MISSING]
                places = shard.index[[chunk % per_shard for chunk in there]].astype(np.int64)
                assert isinstance(shard.file, RemoteFile)
                found = shard.file.read_parts(places[:, 0].tolist(), places[:, 1].tolist()) if there else []
                return dict(zip(there, found, strict=True))
            except (CodesError, OSError):
                return {}  # `read_chunk` will say it

        with ThreadPoolExecutor(min(len(numbers), FETCHERS)) as threads:
            return {chunk: data for found in threads.map(fetch, numbers) for chunk, data in found.items()}

    def _scratch(self) -> native.Scratch:
        """This thread's memory for what a chunk is on its way."""
        if not hasattr(self._thread, "scratch"):
            layout = self._layout
            self._thread.scratch = native.Scratch.of(layout.max_chunk_bytes, layout.raw_bytes, layout.dtype.itemsize)
        return self._thread.scratch

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
        self,
        source: ChunkSource,
        check: Callable[[np.ndarray[Any, Any], int], None],
        name: str,
        cache_bytes: int,
        below: int = 0,
    ) -> None:
        """Reads nothing yet.

        Args:
            source: gives chunks.
            check: called with the wanted rows of a chunk and the first one's number; raises CodesError when a value cannot be.
            name: of the array, for errors.
            cache_bytes: decoded chunks kept; one at least.
            below: values less than this pass the check; 0 when that is not all that it looks at.
        """
        self._source, self._check, self._name, self._below = source, check, name, below
        chunk_bytes = math.prod(source.chunk_shape) * source.dtype.itemsize
        self._cache: LatestUsed[tuple[np.ndarray[Any, Any], bool]] = LatestUsed(max(1, cache_bytes // chunk_bytes))

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
        cuts = [0, *(np.flatnonzero(chunks[1:] != chunks[:-1]) + 1).tolist(), len(rows)]
        numbers = chunks[cuts[:-1]].tolist()
        done = 0
        while done < len(numbers):
            stop = done  # of whole chunks in a row, to be read at once
            while self._below and stop < len(numbers) and cuts[stop + 1] - cuts[stop] == self.chunk_rows:
                stop += 1
            while done < stop:
                found = self._source.read_chunks(numbers[done:stop], out[cuts[done] : cuts[stop]], self._below)
                done += found
                last = min(done + 1, stop) if found else stop  # none found: they cannot be read at once, also not later
                for place in range(done, last):
                    self._read_from(
                        numbers[place], rows[cuts[place] : cuts[place + 1]], out[cuts[place] : cuts[place + 1]]
                    )
                done = last
            if done < len(numbers):  # a part of a chunk
                self._read_from(numbers[done], rows[cuts[done] : cuts[done + 1]], out[cuts[done] : cuts[done + 1]])
                done += 1

    def read_row(self, row: int, out: np.ndarray[Any, Any]) -> None:
        """The same for one row, with fewer steps: `out` is [1, *grid]."""
        self._read_from(row // self.chunk_rows, np.array([row]), out)

    def _read_from(self, chunk: int, rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """Reads rows of one chunk."""
        first, sound = chunk * self.chunk_rows, False
        try:
            if len(rows) == self.chunk_rows:
                self._source.read_chunk(chunk, out)
            else:
                values, sound = self._whole(chunk)
                start, last = int(rows[0]) - first, int(rows[-1]) - first
                if last - start == len(rows) - 1:
                    out[:] = values[start : last + 1]
                else:
                    np.take(values, rows - first, axis=0, out=out, mode="clip")
        except CodesError as error:
            raise CodesError(
                f"{self._name} cannot be read in rows {first}..{first + self.chunk_rows - 1}: {error}. See: vqmill verify."
            ) from error
        if not sound:
            self._check(out, int(rows[0]))

    def _whole(self, chunk: int) -> tuple[np.ndarray[Any, Any], bool]:
        """A decoded chunk, and whether all of it passes the check; the rows behind a store's last one do not."""
        kept = self._cache.get(chunk)
        if kept is None:
            values = np.empty(self._source.chunk_shape, self._source.dtype)
            self._source.read_chunk(chunk, values)
            kept = (values, self._passes(values))
            self._cache.put(chunk, kept)
        return kept

    def _passes(self, values: np.ndarray[Any, Any]) -> bool:
        try:
            self._check(values, 0)
        except CodesError:
            return False
        return True
