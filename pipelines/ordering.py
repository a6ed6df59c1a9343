"""Cuts Zarr shards out of spans in corpus order. Pure: knows nothing of Ray, disks or codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vqmill.commits import Counts, Cursor

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class Piece(Generic[Payload]):
    """Rows first..stop-1 of one span; `ends_span` says that the span's quarantine rows come along."""

    payload: Payload
    first: int
    stop: int
    ends_span: bool


@dataclass
class ShardJob(Generic[Payload]):
    """One Zarr shard to be written: its pieces, what it counts, and where the next one begins."""

    shard: int
    pieces: list[Piece[Payload]] = field(default_factory=list)
    rows: int = 0
    counts: Counts = field(default_factory=Counts)
    cursor: Cursor = field(default_factory=Cursor)


class ShardCutter(Generic[Payload]):
    """Takes spans in corpus order, gives whole Zarr shards.

    A shard is given when the first row of the next one is known: so the spans without rows behind a full shard belong to it, and its
    cursor names the next row. A span's quarantine rows and counts belong to the shard that holds the span's end.
    """

    def __init__(self, rows_per_shard: int, opened: ShardJob[Payload], start: Cursor) -> None:
        """Begins at a commit's cursor, or at the beginning.

        Args:
            rows_per_shard: rows of a full Zarr shard.
            opened: the first Zarr shard that is given; it may hold rows and counts already, of a commit that is opened again.
            start: where the spans begin.
        """
        self._rows_per_shard = rows_per_shard
        self._start = start
        self._opened = self._job = opened

    def add(
        self, input_shard: int, span: int, rows: int, counts: Counts, payload: Payload
    ) -> Iterator[ShardJob[Payload]]:
        """Takes the next span; gives the Zarr shards that it completes (several when it is longer than they are)."""
        begin = self._start.row if (input_shard, span) == (self._start.input_shard, self._start.span) else 0
        assert begin <= rows, (
            f"span {span} of input shard {input_shard} has {rows} rows, {begin} of them were committed before"
        )
        while True:
            job = self._job
            if job.rows == self._rows_per_shard and begin < rows:
                yield self._cut(Cursor(input_shard, span, begin))
                continue
            stop = min(rows, begin + self._rows_per_shard - job.rows)
            job.pieces.append(Piece(payload, begin, stop, ends_span=stop == rows))
            job.rows += stop - begin
            begin = stop
            if begin == rows:
                job.counts = job.counts + counts
                return

    def finish(self, input_shards: int) -> Iterator[ShardJob[Payload]]:
        """Gives the last, ragged Zarr shard, if there is one, and the opened one in any case."""
        if self._job.pieces or (self._job is self._opened and self._job.rows + self._job.counts.seen):
            yield self._cut(Cursor(input_shards, 0, 0))

    def _cut(self, cursor: Cursor) -> ShardJob[Payload]:
        job = self._job
        job.cursor = cursor
        self._job = ShardJob(job.shard + 1)
        return job
