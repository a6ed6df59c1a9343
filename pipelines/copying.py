"""Copies rows of code stores into a new one: Zarr shards are cut anew, codes are not computed anew.

The engine of `merge` and `slice`. Sources stand to a copy as input shards stand to `tokenize`: the copy goes through them in order, in spans
of 256 rows, and commits what assembly.py makes of them. So a killed copy goes on at its last commit and ends with the same bytes as one
that was not interrupted, and Zarr shards that `repair` took away are made again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow as pa

from pipelines.assembly import ArrivedSpan, Order, SpanFacts, Written, carry_out, extend, mend
from pipelines.encoder import Span
from pipelines.outputs import require_room
from pipelines.selection import SPAN_ROWS, Source
from vqmill.commits import Counts, Cursor
from vqmill.layout import find_spec
from vqmill.places import Where
from vqmill.spec import StoreSpec
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import StoreWriter

THREADS = min(4, os.cpu_count() or 1)  # each holds one Zarr shard; decoding, encoding and hashing release the GIL


@dataclass(frozen=True)
class CopyResult:
    """What a copy came to.

    Attributes:
        counts: input samples of the whole store, without files skipped beside them.
        rows: of the store.
        resumed_rows: of them, those that were committed before this run.
        mended: committed Zarr shards whose files were lost and were made again.
        did_something: whether the store was not finished already.
        seconds: of this run.
    """

    counts: Counts
    rows: int
    resumed_rows: int
    mended: tuple[int, ...]
    did_something: bool
    seconds: float


def copy_rows(
    sources: Sequence[Source], out: Where, spec: StoreSpec, progress: Callable[[int, int], None]
) -> CopyResult:
    """Makes a store of the sources' rows, one source behind the other, or goes on with it.

    Lines of the samples table are copied as they are: `key`, `source`, `input_shard` and `index` keep the meaning that they have in the
    corpus of each source. At most THREADS Zarr shards are in memory.

    Args:
        sources: what is copied.
        out: the new store's folder or address.
        spec: the new store's specification (joining.py).
        progress: called with (rows written, rows to be written in this run).

    Raises:
        UsageError: the place holds another store, is being written by another job, or has too little room.
        CodesError: a source is damaged, or was written to meanwhile. What was committed is left as an unfinished store.
    """
    start = time.monotonic()
    rows = sum(len(source.rows) for source in sources)
    found = find_spec(out)
    committed = found.num_rows if found else 0
    require_room(out, max(0, rows - committed) * spec.row_bytes + sum(source.table_bytes for source in sources))
    with StoreWriter(out, spec) as writer:
        resumed, unfinished = writer.spec.num_rows, not writer.spec.complete
        missing = writer.missing_shards() if unfinished else []
        if unfinished:
            lost = sum(writer.commits[shard].rows for shard in missing)
            with ThreadPoolExecutor(THREADS, thread_name_prefix="copy") as threads:
                hands = _Threads(sources, threads, partial(_report, progress, rows - resumed + lost))
                try:
                    mend(writer, missing, partial(spans_between, sources), hands)
                    extend(writer, spans_between(sources, writer.cursor, Cursor(len(sources))), len(sources), hands)
                finally:
                    threads.shutdown(cancel_futures=True)
            for source in sources:
                source.refuse_changed()
            assert (writer.spec.num_rows, writer.counts.seen) == (rows, spec.segments[-1].num_samples)
            writer.finish()
        return CopyResult(
            writer.counts, writer.spec.num_rows, resumed, tuple(missing), unfinished, time.monotonic() - start
        )


def spans_between(sources: Sequence[Source], start: Cursor, stop: Cursor) -> Iterator[ArrivedSpan]:
    """The spans from one cursor to another; of the span in which `stop` lies, all. None is read yet."""
    for unit, source in enumerate(sources):
        first = start.span if unit == start.input_shard else 0
        last = stop.span + bool(stop.row) if unit == stop.input_shard else source.num_spans
        if start.input_shard <= unit <= stop.input_shard:
            for span in range(first, last):
                facts = SpanFacts(span, source.span_rows(span), source.span_counts(span))
                yield ArrivedSpan(unit, facts, (unit, span))


def _report(progress: Callable[[int, int], None], total: int, done: int) -> None:
    progress(done, total)


class _Threads:
    """Threads that read what an order is made of, and carry it out: the `Hands` of assembly.py. Payloads are (source, span)."""

    def __init__(self, sources: Sequence[Source], threads: ThreadPoolExecutor, report: Callable[[int], None]) -> None:
        self._sources, self._threads, self._report = sources, threads, report
        self._done = 0
        report(0)

    def submit(self, order: Order, payloads: list[tuple[int, int]]) -> Future[tuple[Written, int]]:
        """Begins a write."""
        return self._threads.submit(_read_and_write, self._sources, order, payloads)

    def ready(self, handle: Future[tuple[Written, int]]) -> bool:
        """Whether it is done."""
        return handle.done()

    def collect(self, handle: Future[tuple[Written, int]]) -> Written:
        """Waits for it.

        Raises:
            CodesError: what it read is damaged.
        """
        written, rows = handle.result()
        self._done += rows
        self._report(self._done)
        return written


def _read_and_write(
    sources: Sequence[Source], order: Order, payloads: Sequence[tuple[int, int]]
) -> tuple[Written, int]:
    """Writes one Zarr shard, and says how many rows it took from the sources; those of a source are read together."""
    parts: list[tuple[Source, int, int]] = []
    quarantine = [QUARANTINE_SCHEMA.empty_table()]
    for unit, group in groupby(zip(payloads, order.pieces, strict=True), key=lambda pair: pair[0][0]):
        source, pieces = sources[unit], [(span, *piece) for (_, span), piece in group]
        first, stop = pieces[0][0] * SPAN_ROWS + pieces[0][1], pieces[-1][0] * SPAN_ROWS + pieces[-1][2]
        if stop > first:
            parts.append((source, first, stop))
        quarantine += [source.read_quarantine(span) for span, _, _, ends in pieces if ends]
    rows = sum(stop - first for _, first, stop in parts)
    codes = {
        level.name: np.concatenate([source.read_codes(level.name, first, stop) for source, first, stop in parts])
        for level in order.spec.levels
        if parts
    }
    samples = [SAMPLES_SCHEMA.empty_table(), *(source.read_samples(first, stop) for source, first, stop in parts)]
    whole = Span(0, codes, pa.concat_tables(samples), pa.concat_tables(quarantine))
    return carry_out(replace(order, pieces=((0, rows, True),)), whole), rows
