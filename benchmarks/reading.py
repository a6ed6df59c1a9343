"""What the reader of a code store costs: chunks against their codec alone, single rows against zarr-python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc, zstd

import vqmill
from benchmarks.measure import Line, compare
from benchmarks.stores import LEVEL, ROWS_PER_SHARD, draw_codes, store_spec, write_store
from vqmill.layout import shard_file
from vqmill.spec import CODECS

Array = np.ndarray[Any, np.dtype[Any]]

ROWS = 32_768
LOOKUPS = 200
DECODE_TARGET, ROW_TARGET = 0.95, 20.0
CHUNK_ROWS = LEVEL.rows_per_chunk(ROWS_PER_SHARD)
CHUNKS_PER_SHARD = ROWS_PER_SHARD // CHUNK_ROWS
PIECE_ROWS = 16 * CHUNK_ROWS  # of one task: 2 MiB, as in the loader
CRC_BYTES = 4


def decode(folder: Path) -> Iterator[Line]:
    """Whole chunks through the reader, against their codec alone, from memory to memory; as many threads for both.

    The reader also reads the file, verifies the CRC-32C and looks for codes that cannot be.
    """
    codes = draw_codes(ROWS)
    for codec in CODECS:
        path = write_store(folder / f"{codec}.zarr", store_spec(codec=codec), {"codes": codes})
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            # The codec gets threads of ours, too: in the main thread numcodecs would start some of its own.
            with ThreadPoolExecutor(threads) as pool:
                title = f"decoding {ROWS:,} rows [32, 32] uint16, {codec}, {threads} threads, against the codec alone"
                ours, limit = _reader_work(path), _codec_work(path, codec)
                yield compare(title, partial(_spread, pool, ours), partial(_spread, pool, limit), DECODE_TARGET)
        out = np.empty_like(codes)
        for work in (_reader_work(path, out), _codec_work(path, codec, out)):
            out[:] = 0
            for start in range(0, ROWS, PIECE_ROWS):
                work(start)
            assert np.array_equal(out, codes)


def _spread(pool: ThreadPoolExecutor, work: Callable[[int], None]) -> None:
    for done in pool.map(work, range(0, ROWS, PIECE_ROWS)):
        assert done is None


def _reader_work(path: Path, out: Array | None = None) -> Callable[[int], None]:
    """Decodes a piece from a row on, by our reader."""
    reader = vqmill.open_codes(path)["codes"].row_reader(cache_bytes=0)
    place = np.empty((ROWS, *LEVEL.grid), LEVEL.dtype) if out is None else out
    rows = np.arange(ROWS)

    def work(start: int) -> None:
        reader.read(rows[start : start + PIECE_ROWS], place[start : start + PIECE_ROWS])

    return work


def _codec_work(path: Path, codec: str, out: Array | None = None) -> Callable[[int], None]:
    """Decodes a piece from a row on, by nothing but numcodecs."""
    chunks = encoded_chunks(path)
    place = np.empty((ROWS, *LEVEL.grid), LEVEL.dtype) if out is None else out
    decompress = zstd.decompress if codec == "zstd" else blosc.decompress

    def work(start: int) -> None:
        for first in range(start, start + PIECE_ROWS, CHUNK_ROWS):
            decompress(chunks[first // CHUNK_ROWS], place[first : first + CHUNK_ROWS])

    return work


def encoded_chunks(store: Path) -> list[bytes]:
    """Every chunk of the level as it lies in the files, without its checksum."""
    chunks: list[bytes] = []
    for shard in range(ROWS // ROWS_PER_SHARD):
        data = (store / shard_file(LEVEL.name, shard, len(LEVEL.grid))).read_bytes()
        index = np.frombuffer(data[-16 * CHUNKS_PER_SHARD - CRC_BYTES : -CRC_BYTES], "<u8").reshape(-1, 2)
        chunks += [data[start : start + size - CRC_BYTES] for start, size in index.tolist()]
    return chunks


def rows(folder: Path) -> Iterator[Line]:
    """Rows at random, one by one, against zarr-python on the same files."""
    path = write_store(folder / "codes.zarr", store_spec(), {"codes": draw_codes(ROWS)})
    level = vqmill.open_codes(path)["codes"]
    array = zarr.open_array(path / "codes", mode="r")
    generator = np.random.default_rng(0)
    for row in generator.integers(0, ROWS, 10).tolist():
        assert np.array_equal(level[row], np.asarray(array[row]))

    def read(array: Any) -> None:
        for row in generator.integers(0, ROWS, LOOKUPS).tolist():
            array[row]

    yield compare(
        f"{LOOKUPS} random rows of {ROWS:,}, one by one, against zarr-python",
        partial(read, level), partial(read, array), ROW_TARGET,
    )  # fmt: skip
