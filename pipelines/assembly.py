"""From spans in corpus order to committed Zarr shards. Knows nothing of Ray: whoever calls says how a write is carried out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipelines.encoder import Span
from pipelines.ordering import ShardCutter, ShardJob
from vqmill.commits import Commit, Counts, Cursor
from vqmill.errors import CodesError
from vqmill.layout import smallest_codec
from vqmill.places import Place
from vqmill.problems import runs
from vqmill.spec import StoreSpec
from vqmill.writer import StoreWriter, read_shard, write_shard

MAX_WRITES = 4  # Zarr shards being written at a time


@dataclass(frozen=True)
class SpanFacts:
    """What is known of a span without its codes.

    Attributes:
        index: its place in the input shard.
        rows: code rows.
        counts: samples.
        reasons: of those that were quarantined.
        seconds: that it took to make, the waiting for others not counted.
    """

    index: int
    rows: int
    counts: Counts
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0


@dataclass(frozen=True)
class ArrivedSpan:
    """A span whose turn has come: of input shard `unit`, with its codes or a reference to them."""

    unit: int
    facts: SpanFacts
    payload: Any


@dataclass(frozen=True)
class Order:
    """A Zarr shard to be written.

    Attributes:
        store: where the store is, on whatever machine the order is carried out.
        spec: its specification; without a codec, the write chooses.
        shard: its number.
        pieces: (first row, stop row, whether the span's quarantine comes along) of as many spans.
        opened: its record, when it is there and goes on behind what it holds.
        expected: its files as recorded, when it is made again.
        begun: the record before, when another run wrote the first rows of the first span into it.
    """

    store: Place
    spec: StoreSpec
    shard: int
    pieces: tuple[tuple[int, int, bool], ...]
    opened: Commit | None = None
    expected: Mapping[str, Mapping[str, Any]] | None = None
    begun: Commit | None = None


@dataclass(frozen=True)
class Written:
    """What a write gave: facts of the files, and the codec of their chunks (None: there was no row to choose by)."""

    files: dict[str, dict[str, Any]]
    codec: str | None


def carry_out(order: Order, *spans: Span) -> Written:
    """Writes one Zarr shard. A pure function of the spans, but for the files.

    Raises:
        CodesError: the files of an opened Zarr shard are not the recorded ones, or the first span begins otherwise than what is committed
            of it.
    """
    if order.begun and (first := order.pieces[0][0]):
        held = read_shard(order.store, order.spec, order.begun)[1]
        rows = min(first, held.num_rows)
        if held.slice(held.num_rows - rows) != spans[0].samples.slice(first - rows, rows):
            raise _other_beginning(order.store, order.begun, first)
    spec = order.spec
    cut = [(span, first, stop, ends) for span, (first, stop, ends) in zip(spans, order.pieces, strict=True)]
    if order.opened:
        held = Span(-1, *read_shard(order.store, spec, order.opened))
        cut.insert(0, (held, 0, order.opened.rows, True))
    filled = [(span, first, stop) for span, first, stop, _ in cut if stop > first]
    codes = {
        level.name: np.concatenate([span.codes[level.name][first:stop] for span, first, stop in filled])
        for level in spec.levels
        if filled
    }
    samples = pa.concat_tables([span.samples.slice(first, stop - first) for span, first, stop, _ in cut])
    quarantine = pa.concat_tables([span.quarantine.slice(0, None if ends else 0) for span, _, _, ends in cut])
    if spec.codec is None and filled:
        spec = replace(spec, codec=smallest_codec(spec, codes))
    files = write_shard(order.store, spec, order.shard, codes, samples, quarantine, order.expected)
    return Written(files, spec.codec)


def _other_beginning(store: Place, before: Commit, rows: int) -> CodesError:
    """A span of which rows are committed must give these rows again, or what follows them would be lost or come twice."""
    return CodesError(
        f"{store.name}: the corpus no longer gives the last {rows:,} rows that were committed (before row {before.first_row + before.rows:,}): files "
        "of it were restored, damaged or changed since. Put them back as they were until this store is finished."
    )


class Hands(Protocol):
    """Who carries out orders, side by side."""

    def submit(self, order: Order, payloads: list[Any]) -> Any:
        """Begins a write; returns a handle."""
        ...

    def ready(self, handle: Any) -> bool:
        """Whether it is done."""
        ...

    def collect(self, handle: Any) -> Written:
        """Waits for it."""
        ...


class Writes:
    """Orders under way, at most MAX_WRITES; their results are accepted in order."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._running: deque[tuple[Any, Callable[[Written], None]]] = deque()

    def add(self, order: Order, payloads: list[Any], accept: Callable[[Written], None]) -> None:
        """Begins one more, when there is room."""
        while len(self._running) >= MAX_WRITES:
            self._settle()
        self._running.append((self._hands.submit(order, payloads), accept))

    def settle_ready(self) -> None:
        """Accepts what is done."""
        while self._running and self._hands.ready(self._running[0][0]):
            self._settle()

    def drain(self) -> None:
        """Waits for all."""
        while self._running:
            self._settle()

    def _settle(self) -> None:
        handle, accept = self._running.popleft()
        accept(self._hands.collect(handle))


def extend(writer: StoreWriter, spans: Iterable[ArrivedSpan], units: int, hands: Hands) -> None:
    """Commits what the spans hold behind what is committed.

    The last commit is always opened again: it may be the ragged one of a corpus that has grown since. When it was final, nothing is
    added to it and it stays as it is.

    Args:
        writer: of an unfinished store without missing Zarr shards.
        spans: from `writer.cursor` to the end of the plan.
        units: input shards of the plan.
        hands: who writes.
    """
    writes = Writes(hands)
    opened = _opened(writer)
    cutter: ShardCutter[Any] = ShardCutter(writer.spec.rows_per_shard, opened, writer.cursor)
    reopened = writer.commits[-1] if writer.commits else None
    start = writer.cursor
    begun = reopened if start.row else None
    for span in spans:
        at_start = (span.unit, span.facts.index) == (start.input_shard, start.span)
        if begun and at_start and span.facts.rows <= start.row:
            raise _other_beginning(writer.store, begun, start.row)
        for job in cutter.add(span.unit, span.facts.index, span.facts.rows, span.facts.counts, span.payload):
            _put(writer, writes, job, reopened, begun)
        writes.settle_ready()
    for job in cutter.finish(units):
        _put(writer, writes, job, reopened, begun)
    writes.drain()


def _opened(writer: StoreWriter) -> ShardJob[Any]:
    if not writer.commits:
        return ShardJob(0)
    last = writer.commits[-1]
    return ShardJob(last.shard, rows=last.rows, counts=last.counts)


def _put(
    writer: StoreWriter, writes: Writes, job: ShardJob[Any], reopened: Commit | None, begun: Commit | None
) -> None:
    again = reopened if reopened and reopened.shard == job.shard else None
    if again and not job.pieces:
        if job.cursor != again.cursor:  # input shards without samples came behind it
            writer.rewrite_last(again.rows, job.cursor, again.counts, again.files)
        return

    def accept(written: Written) -> None:
        if writer.spec.codec is None and written.codec is not None:
            writer.choose_codec(written.codec)
        (writer.rewrite_last if again else writer.commit)(job.rows, job.cursor, job.counts, written.files)

    before = begun if begun and job.shard == begun.shard + 1 else None
    order = Order(writer.store, writer.spec, job.shard, _cuts(job), again, begun=before)
    writes.add(order, [piece.payload for piece in job.pieces], accept)
    job.pieces.clear()  # the write holds the spans now; they are freed when it is done
    if writer.spec.codec is None:
        writes.drain()  # the first Zarr shard chooses for all


def mend(
    writer: StoreWriter,
    missing: Sequence[int],
    between: Callable[[Cursor, Cursor], Iterable[ArrivedSpan]],
    hands: Hands,
) -> None:
    """Makes the missing Zarr shards again, exactly as they were.

    Args:
        writer: of an unfinished store.
        missing: from `writer.missing_shards`.
        between: gives the spans from one cursor to another; all of the last one's span when that lies inside it.
        hands: who writes.

    Raises:
        CodesError: they come out differently; nothing was written then.
    """
    for first, last in runs(missing):
        _mend_run(writer, first, last, between, hands)
    if missing and (left := writer.missing_shards()):
        raise CodesError(
            f"{writer.store.name}: the corpus no longer gives the rows of Zarr shards {left}: it is not what made this store. "
            "Restore their files from a copy."
        )


def _mend_run(
    writer: StoreWriter, first: int, last: int, between: Callable[[Cursor, Cursor], Iterable[ArrivedSpan]], hands: Hands
) -> None:
    """Makes consecutive Zarr shards again."""
    start = writer.commits[first - 1].cursor if first else Cursor()
    stop = writer.commits[last].cursor
    writes = Writes(hands)
    cutter: ShardCutter[Any] = ShardCutter(writer.spec.rows_per_shard, ShardJob(first), start)

    def put(job: ShardJob[Any]) -> None:
        if job.shard <= last:  # else it is the rest of the span that `stop` lies in
            expected = writer.commits[job.shard].files
            order = Order(writer.store, writer.spec, job.shard, _cuts(job), None, expected)
            payloads = [piece.payload for piece in job.pieces]
            writes.add(order, payloads, lambda written: writer.accept_again(job.shard, written.files))
        job.pieces.clear()

    for span in between(start, stop):
        for job in cutter.add(span.unit, span.facts.index, span.facts.rows, span.facts.counts, span.payload):
            put(job)
        writes.settle_ready()
    for job in cutter.finish(stop.input_shard):
        put(job)
    writes.drain()


def _cuts(job: ShardJob[Any]) -> tuple[tuple[int, int, bool], ...]:
    return tuple((piece.first, piece.stop, piece.ends_span) for piece in job.pieces)
