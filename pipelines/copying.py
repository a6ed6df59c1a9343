"""Copies rows of code stores into a new one: Zarr shards are cut anew, codes are not computed anew.

The engine of `merge` and `slice`. Sources stand to a copy as input shards stand to `tokenize`: the copy goes through them in order, in spans
of 256 rows, and resumes at the cursor of its last commit, so that a killed copy ends with the same bytes as one that was not interrupted.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.ordering import ShardCutter, ShardJob
from pipelines.outputs import require_room
from pipelines.selection import SPAN_ROWS, Source
from vqmill.layout import read_spec
from vqmill.spec import StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import Counts, Cursor, StoreWriter, write_shard

THREADS = min(4, os.cpu_count() or 1)  # each holds one Zarr shard; decoding, encoding and hashing release the GIL
Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CopyResult:
    """The new store's totals, without skipped files, and how much of it was there before."""

    counts: Counts
    rows: int
    resumed_rows: int
    seconds: float


@dataclass(frozen=True)
class _Span:
    """A span that is read only when its Zarr shard is written."""

    source: int
    number: int


def copy_rows(
    sources: Sequence[Source], out: Path, spec: StoreSpec, progress: Callable[[int, int], None]
) -> CopyResult:
    """Makes a store of the sources' rows, one source behind the other, or goes on with it.

    Lines of the samples table are copied as they are: `key`, `source`, `input_shard` and `index` keep the meaning that they have in the
    corpus of each source. At most THREADS Zarr shards are in memory.

    Args:
        sources: what is copied.
        out: the new store's folder.
        spec: the new store's specification (joining.py).
        progress: called with (rows committed, rows in all).

    Raises:
        UsageError: the place holds another store, is being written by another job, or has too little room.
        CodesError: a source is damaged, or was written to meanwhile. What was committed is left as an unfinished store.
    """
    start = time.monotonic()
    rows = sum(len(source.rows) for source in sources)
    committed = read_spec(out).num_rows if (out / "zarr.json").exists() else 0
    require_room(out, (rows - committed) * spec.row_bytes + sum(source.table_bytes for source in sources))
    with StoreWriter(out, spec) as writer:
        resumed = writer.spec.num_rows
        if not writer.spec.complete:
            _copy(sources, writer, lambda: progress(writer.spec.num_rows, rows))
            for source in sources:
                source.refuse_changed()
            assert (writer.spec.num_rows, writer.counts.seen) == (rows, spec.segments[-1].num_samples)
            writer.finish()
        return CopyResult(writer.counts, writer.spec.num_rows, resumed, time.monotonic() - start)


def _copy(sources: Sequence[Source], writer: StoreWriter, report: Callable[[], None]) -> None:
    """Writes what is missing: Zarr shards in threads, commits in order."""
    cutter: ShardCutter[_Span] = ShardCutter(writer.spec.rows_per_shard, writer.spec.num_commits, writer.cursor)
    waiting: deque[tuple[ShardJob[_Span], Future[Files]]] = deque()
    report()

    def commit_head() -> None:
        job, files = waiting.popleft()
        writer.commit(job.rows, job.cursor, job.counts, files.result())
        report()

    with ThreadPoolExecutor(THREADS, thread_name_prefix="copy") as threads:
        try:
            for job in _jobs(sources, cutter, writer.cursor):
                if len(waiting) == 2 * THREADS:
                    commit_head()
                waiting.append((job, threads.submit(_write, writer.store, writer.spec, sources, job)))
            while waiting:
                commit_head()
        finally:
            threads.shutdown(cancel_futures=True)


def _jobs(sources: Sequence[Source], cutter: ShardCutter[_Span], cursor: Cursor) -> Iterator[ShardJob[_Span]]:
    """The Zarr shards from a cursor on."""
    for number in range(cursor.input_shard, len(sources)):
        source = sources[number]
        for span in range(cursor.span if number == cursor.input_shard else 0, len(source.encoded)):
            yield from cutter.add(number, span, source.span_rows(span), source.span_counts(span), _Span(number, span))
    yield from cutter.finish(len(sources))


def _write(out: Path, spec: StoreSpec, sources: Sequence[Source], job: ShardJob[_Span]) -> Files:
    """Reads the rows of one Zarr shard and writes its files."""
    parts: list[tuple[Source, int, int]] = []
    quarantine = [QUARANTINE_SCHEMA.empty_table()]
    for number, group in groupby(job.pieces, lambda piece: piece.payload.source):
        source, pieces = sources[number], list(group)
        first = pieces[0].payload.number * SPAN_ROWS + pieces[0].first
        stop = pieces[-1].payload.number * SPAN_ROWS + pieces[-1].stop
        if stop > first:
            parts.append((source, first, stop))
        quarantine += [source.read_quarantine(piece.payload.number) for piece in pieces if piece.ends_span]
    codes = {
        level.name: np.concatenate([source.read_codes(level.name, first, stop) for source, first, stop in parts])
        for level in spec.levels
        if parts
    }
    samples = [SAMPLES_SCHEMA.empty_table(), *(source.read_samples(first, stop) for source, first, stop in parts)]
    # One chunk a column, whatever the sources' parts: how a table is cut shows in the Parquet bytes.
    return write_shard(
        out,
        spec,
        job.shard,
        codes,
        pa.concat_tables(samples).combine_chunks(),
        pa.concat_tables(quarantine).combine_chunks(),
    )
